"""Tables between tensor names of a published checkpoint and paths of our tree, read in both directions.

A row names a tensor, a leaf and how its dims map: `Row("self_attn.q_proj.weight", "attention/q_proj/weight", "(NK)D -> DNK")` says
that the file holds heads and head dim merged and in front, we hold three dims. Which rows apply follows from the leaves that the
model has, so that one table serves a family with and without query latent, experts or MTP.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mdl.hf import fp8
from mdl.transformer import TransformerConfig


class Layout:
    """`(NK)D -> DNK`: dims of the tensor on disk, those in brackets merged, and dims of ours; letters as in `mdl.dims`."""

    def __init__(self, text: str):
        theirs, self.ours = (side.strip() for side in text.split("->"))
        self.groups: list[str] = []
        while theirs:
            group, theirs = theirs[1:].split(")", 1) if theirs[0] == "(" else (theirs[0], theirs[1:])
            self.groups.append(group)
        self.theirs = "".join(self.groups)
        if sorted(self.theirs) != sorted(self.ours) or len(set(self.ours)) < len(self.ours):
            raise ValueError(f"layout {text!r}: both sides must name the same dims, each once")

    def shape_on_disk(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape for our shape."""
        sizes = dict(zip(self.ours, shape, strict=True))
        return tuple(math.prod(sizes[dim] for dim in group) for group in self.groups)

    def read(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as ours, of `shape`; a view."""
        sizes = dict(zip(self.ours, shape, strict=True))
        split = tensor.reshape([sizes[dim] for dim in self.theirs])
        return split.transpose([self.theirs.index(dim) for dim in self.ours])

    def part(
        self, index: Sequence[range], shape: tuple[int, ...]
    ) -> tuple[tuple[slice, ...], tuple[int, ...], tuple[slice, ...]]:
        """Where `index` of ours, an array of `shape`, lies: slices of the tensor, our shape of them, and the index in that.

        Of merged dims only the first is cut on disk, the others after reading.
        """
        sizes = dict(zip(self.ours, shape, strict=True))
        wanted = dict(zip(self.ours, index, strict=True))
        slices = []
        for group in self.groups:
            stride = math.prod(sizes[dim] for dim in group[1:])
            slices.append(slice(wanted[group[0]].start * stride, wanted[group[0]].stop * stride))
        cut = {group[0] for group in self.groups}
        part_shape = tuple(len(wanted[dim]) if dim in cut else sizes[dim] for dim in self.ours)
        rest = tuple(slice(None) if dim in cut else slice(wanted[dim].start, wanted[dim].stop) for dim in self.ours)
        return tuple(slices), part_shape, rest

    def write(self, ours: np.ndarray) -> np.ndarray:
        """The inverse of `read`."""
        turned = ours.transpose([self.ours.index(dim) for dim in self.theirs])
        return turned.reshape(self.shape_on_disk(ours.shape))


@dataclasses.dataclass(frozen=True)
class Row:
    name: str  # of the tensor, after the layer's own prefix; {expert} counts experts
    path: str  # of our leaf, below the layer; an {expert} in the name is its leading dim
    dims: str  # the Layout of one tensor
    is_copy: bool = False  # holds the same numbers as another row's tensor: not read, and not needed for reading
    is_written: bool = True  # a file that we write holds it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a family. `mtp` stands beside a layer's own rows in the layers stored after the last one."""

    model: tuple[Row, ...]
    layer: tuple[Row, ...]
    mtp: tuple[Row, ...] = ()
    mtp_copies: tuple[Row, ...] = ()  # paths from the root
    tied: tuple[Row, ...] = ()  # instead of rows of `model` when the head is the embedding
    tied_mtp: tuple[Row, ...] = ()  # instead of rows of `mtp_copies` then
    layer_prefix: str = "model.layers.{layer}."


@dataclasses.dataclass(frozen=True)
class Binding:
    """One leaf of ours and the tensors that make it: `names` has the leaf's leading dims (layers, experts)."""

    row: Row
    layout: Layout
    path: str
    shape: tuple[int, ...]
    names: np.ndarray

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """Our shape of one tensor."""
        return self.shape[self.names.ndim :]

    @property
    def shape_on_disk(self) -> tuple[int, ...]:
        return self.layout.shape_on_disk(self.inner_shape)

    def read(self, tensors: Mapping[str, np.ndarray], index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The slice `index` of the leaf, FP8 dequantized; of the tensors, only what lies in it is touched."""
        leading = self.names.ndim
        names = np.asarray(self.names[index[:leading]], dtype=object)
        inner = [range(*s.indices(n)) for s, n in zip(index[leading:], self.inner_shape, strict=True)]
        slices, part_shape, rest = self.layout.part(inner, self.inner_shape)
        leaf = np.empty((*names.shape, *map(len, inner)), dtype)
        for at in np.ndindex(names.shape):
            name = str(names[at])
            tensor = tensors[name]
            part = fp8.read(tensors, name, slices, dtype) if tensor.dtype == fp8.DTYPE else tensor[slices]
            leaf[at] = self.layout.read(part, part_shape)[rest]
        return leaf

    def write(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of a whole leaf, with their names."""
        for at in np.ndindex(self.names.shape):
            yield str(self.names[at]), self.layout.write(leaf[at])


def bind(table: Table, config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Binding]:
    """What `table` says about a model whose leaves have these shapes. ValueError for leaves that it has no name for."""
    layers, first = config.num_hidden_layers, config.num_prefix_layers
    modules = config.mtp.num_nextn_predict_layers if config.mtp else 0

    def at_layers(rows: tuple[Row, ...], ours: str, numbers: list[int] | int) -> list[Binding | None]:
        return [_bind_row(row, table.layer_prefix, ours, numbers, shapes) for row in rows]

    found = [_bind_row(row, "", "", 0, shapes) for row in table.model]
    if config.tie_word_embeddings:
        found += [_bind_row(row, "", "", 0, shapes) for row in table.tied]
    for i in range(first):
        found += at_layers(table.layer, f"prefix/{i}/", i)
    if config.layers_differ:
        for i in range(first, layers):
            found += at_layers(table.layer, f"stack/{i - first}/", i)
    else:
        found += at_layers(table.layer, "stack/", list(range(first, layers)))
    for k in range(modules):
        found += at_layers(table.layer, f"mtp/{k}/block/", layers + k)
        found += at_layers(table.mtp, f"mtp/{k}/", layers + k)
        found += at_layers(table.mtp_copies + (table.tied_mtp if config.tie_word_embeddings else ()), "", layers + k)

    bindings = [binding for binding in found if binding is not None]
    unnamed = shapes.keys() - {binding.path for binding in bindings if not binding.row.is_copy}
    if unnamed:
        raise ValueError(f"this family has no tensor for {', '.join(sorted(unnamed))}")
    return bindings


def _bind_row(
    row: Row, prefix: str, ours: str, layers: list[int] | int, shapes: Mapping[str, tuple[int, ...]]
) -> Binding | None:
    """None where the model has no such leaf. A list of layers is a leading dim of the leaf."""
    path = ours + row.path
    if path not in shapes:
        return None
    shape, layout = shapes[path], Layout(row.dims)
    experts = "{expert}" in row.name
    leading = shape[: len(shape) - len(layout.ours)]
    names = np.empty(leading, dtype=object)
    for at in np.ndindex(leading):
        layer = layers[at[0]] if isinstance(layers, list) else layers
        expert = at[-1] if experts else 0
        names[at] = (prefix + row.name).format(layer=layer, expert=expert)
    return Binding(row, layout, path, shape, names)
