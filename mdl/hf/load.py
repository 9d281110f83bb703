"""Loads a Hugging Face checkpoint directory onto a mesh, leaf by leaf and shard by shard, and names our arrays as its files do."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mdl.hf import family, fp8
from mdl.hf.safetensors import Tensors, open_tensors, short
from mdl.hf.table import Binding, Table, bind
from mdl.pure import PureModel, Tree
from mdl.transformer import TransformerConfig

_READABLE = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16)))  # beside FP8 matrices
_NAMES_IN_MESSAGE = 8


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The config.json of a directory; ValueError if it is not a JSON object."""
    path = pathlib.Path(directory) / "config.json"
    try:
        config_json = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config_json, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return config_json


def load_params(directory: str | os.PathLike, model: PureModel, mesh: Mesh) -> Tree:
    """{"params": ..., "buffers": ...} of `model`, on `mesh`, in the dtypes of its config.

    Each process reads the slices that its own devices hold. ValueError lists what is missing, left over or of another shape,
    before anything is read.
    """
    tensors = open_tensors(directory)
    with jax.set_mesh(mesh):
        abstract = model.abstract()
    bindings = bind(family(read_config(directory)).TABLE, model.config, leaf_shapes(abstract))
    check(bindings, tensors, directory)
    sources = {binding.path: binding for binding in bindings if not binding.row.is_copy}

    def load(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        source = sources[_name(path)]
        sharding = NamedSharding(mesh, leaf.sharding.spec)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: source.read(tensors, index or (), np.dtype(leaf.dtype))
        )

    return jax.tree.map_with_path(load, abstract)


def export_tensors(arrays: Tree, config: TransformerConfig, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that a file of this family holds, with their names, from {"params": ..., "buffers": ...}; one leaf at a time."""
    leaves = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(arrays)}
    for binding in bind(table, config, leaf_shapes(arrays)):
        if binding.row.is_written:
            yield from binding.write(np.asarray(leaves[binding.path]))


def leaf_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Shapes by path, `params` and `buffers` in one: "stack/mlp/router/bias"."""
    return {_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path[1:], simple=True, separator="/")


def check(bindings: list[Binding], tensors: Tensors, directory: str | os.PathLike) -> None:
    """One ValueError for everything that keeps these tensors from filling these leaves."""
    bound = {name: binding for binding in bindings for name in binding.names.flat}
    present = {name: tensors.entries[name] for name in bound if name in tensors}
    quantized = {name for name, entry in present.items() if entry.dtype == fp8.DTYPE and len(entry.shape) == 2}
    shapes = {name: binding.shape_on_disk for name, binding in bound.items()}
    shapes |= {fp8.scale_name(name): fp8.scale_shape(shapes[name]) for name in quantized}
    needed = [name for name in shapes if name not in bound or not bound[name].row.is_copy]

    def is_readable(name: str, dtype: np.dtype) -> bool:
        return name in quantized or dtype in (_READABLE if name in bound else fp8.SCALE_DTYPES)

    found = {name: entry for name, entry in tensors.entries.items() if name in shapes}
    problems = {
        "missing": [name for name in needed if name not in tensors],
        "left over": [name for name in tensors if name not in shapes],
        "of another shape": [
            f"{name} {list(entry.shape)} instead of {list(shapes[name])}"
            for name, entry in found.items()
            if entry.shape != shapes[name]
        ],
        "of a dtype that cannot be read": [
            f"{name} {entry.dtype}" for name, entry in found.items() if not is_readable(name, entry.dtype)
        ],
    }
    listed = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(
            f"{directory}: the tensors do not fit config.json: {'; '.join(listed)}{_advice(bindings, tensors)}"
        )


def _advice(bindings: list[Binding], tensors: Tensors) -> str:
    """What to do about files without MTP modules: transformers drops them when it saves a model, and goes on promising them."""
    modules = [binding for binding in bindings if binding.path.startswith("mtp/")]
    if not modules or any(name in tensors for binding in modules for name in binding.names.flat):
        return ""
    return "; the files hold no multi-token-prediction module: set num_nextn_predict_layers to 0 in config.json"


def _some(names: list[str]) -> str:
    return ", ".join(short(name, 200) for name in names[:_NAMES_IN_MESSAGE]) + (
        ", ..." if len(names) > _NAMES_IN_MESSAGE else ""
    )
