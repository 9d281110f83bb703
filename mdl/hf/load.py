"""Loads a Hugging Face checkpoint directory onto a mesh, leaf by leaf and shard by shard, and names our arrays as its files do."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mdl.hf import family
from mdl.hf.safetensors import Tensors, open_tensors
from mdl.hf.table import Binding, Table, bind
from mdl.pure import PureModel, Tree
from mdl.transformer import TransformerConfig

_READABLE = ("float32", "bfloat16", "float16")
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
    expected = {name: binding for binding in bindings for name in binding.names.flat}
    needed = [name for name, binding in expected.items() if not binding.row.is_copy]
    present = {name: tensors.entries[name] for name in expected if name in tensors}
    problems = {
        "missing": [name for name in needed if name not in tensors],
        "left over": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {list(entry.shape)} instead of {list(expected[name].shape_on_disk)}"
            for name, entry in present.items()
            if entry.shape != expected[name].shape_on_disk
        ],
        "of a dtype that cannot be read": [
            f"{name} {entry.dtype}" for name, entry in present.items() if str(entry.dtype) not in _READABLE
        ],
    }
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{directory}: the tensors do not fit config.json: {'; '.join(found)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_IN_MESSAGE]) + (", ..." if len(names) > _NAMES_IN_MESSAGE else "")
