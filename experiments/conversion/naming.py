"""Which array of a checkpoint of ours holds which tensor of a Hugging Face checkpoint."""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments import layers_on_disk
from mdl.hf.load import leaf_shapes
from mdl.hf.table import Binding, Layout, Table, bind
from mdl.pure import PureModel
from mdl.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedTensor:
    tensor: str
    array: str  # "params/layers/3/mlp/experts/gate_EDF"
    array_shape: tuple[int, ...]
    index: tuple[int, ...]  # of the array's leading dims: the expert
    layout: Layout  # of what is left
    is_copy: bool
    is_written: bool  # files that we write hold it, if nothing else is known

    @property
    def is_buffer(self) -> bool:
        return self.array.startswith("buffers/")


@dataclasses.dataclass(frozen=True)
class Naming:
    bindings: list[Binding]
    tensors: list[NamedTensor]


def name_tensors(config: TransformerConfig, table: Table) -> Naming:
    """ValueError for a model that the family of `table` has no names for."""
    abstract = PureModel(config).abstract()
    paths = [path for path, _ in jax.tree.leaves_with_path(abstract)]
    on_disk = dict(zip(map(_leaf_name, paths), layers_on_disk.named_leaves(abstract), strict=True))
    bindings = bind(table, config, leaf_shapes(abstract))
    return Naming(bindings, [named for binding in bindings for named in _expand(binding, *on_disk[binding.path])])


def _expand(binding: Binding, arrays: str | list[str], leaf: Any) -> list[NamedTensor]:
    stacked = isinstance(arrays, list)
    return [
        NamedTensor(
            tensor=str(binding.names[at]),
            array=arrays[at[0]] if isinstance(arrays, list) else arrays,
            array_shape=leaf.shape[stacked:],
            index=at[stacked:],
            layout=binding.layout,
            is_copy=binding.row.is_copy,
            is_written=binding.row.is_written,
        )
        for at in np.ndindex(binding.names.shape)
    ]


def _leaf_name(path: jax.tree_util.KeyPath) -> str:
    """As `leaf_shapes` has it: without params or buffers in front."""
    return jax.tree_util.keystr(path[1:], simple=True, separator="/")
