"""Writes a checkpoint of ours as Orbax would: zarr arrays without OCDBT, each chunk a file of plain bytes.

Such files can be written by many threads and processes in any order, and Orbax reads them as it reads its own.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.conversion.arrays import num_bytes, split, sum_of_words
from experiments.conversion.layouts import MATRIX, row_step, to_ours
from experiments.conversion.naming import NamedTensor
from experiments.conversion.recast import Recipe
from experiments.conversion.sources import leave_page_cache, sum_on_disk
from experiments.conversion.work import Piece
from mdl.hf import fp8
from mdl.hf.table import Layout

STEP = "step_0"
_CHUNK_BYTES = 32 << 20  # of a chunk, where one tensor has more
_GROUP_BYTES = 8 << 20  # of a chunk that holds several experts


@dataclasses.dataclass(frozen=True)
class Array:
    """An array on disk, cut along the experts and the dim that is slowest in the tensors of the files."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    layout: Layout  # of the dims behind the leading ones
    recipes: Any  # an array of a Recipe for each index of the leading dims

    @property
    def inner_shape(self) -> tuple[int, ...]:
        return self.shape[self.recipes.ndim :]

    @property
    def chunk_bytes(self) -> int:
        """Chunks at the edge are as long as the others."""
        return num_bytes((self.dtype, self.chunk))


def plan_arrays(tensors: Sequence[NamedTensor], recipes: Mapping[str, Recipe]) -> list[Array]:
    """The arrays that hold these tensors, in the order of the recipes, which is that of the files."""
    homes = {t.tensor: t for t in tensors}
    for t in tensors:  # scales, where FP8 is kept
        homes[fp8.scale_name(t.tensor)] = dataclasses.replace(t, array=fp8.scale_name(t.array), layout=MATRIX)
    found: dict[str, dict[tuple[int, ...], Recipe]] = {}
    layouts: dict[str, Layout] = {}
    for name, recipe in recipes.items():
        home = homes[name]
        found.setdefault(home.array, {})[home.index] = recipe
        layouts[home.array] = home.layout
    shapes = {t.array: t.array_shape for t in tensors}
    return [_plan(name, parts, layouts[name], shapes) for name, parts in found.items()]


def _plan(
    name: str, parts: Mapping[tuple[int, ...], Recipe], layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> Array:
    leading = tuple(1 + max(index) for index in zip(*parts, strict=True))
    recipes = np.empty(leading, dtype=object)
    for index, recipe in parts.items():
        recipes[index] = recipe
    (dtype, on_disk), *_ = recipes.flat[0].sizes.values()
    inner = shapes[name][len(leading) :] if name in shapes else on_disk
    size = num_bytes((dtype, inner))
    if size > _CHUNK_BYTES:
        slow = layout.ours.index(layout.theirs[0])
        step = row_step(layout, inner)
        multiple = math.lcm(step, recipes.flat[0].row_step) // step
        limit = max(multiple, _CHUNK_BYTES * inner[slow] // size // multiple * multiple)
        length = -(-len(split(inner[slow], limit)[0]) // multiple) * multiple
        chunk = (*(1 for _ in leading), *inner[:slow], min(length, inner[slow]), *inner[slow + 1 :])
    else:
        group = max(1, _GROUP_BYTES // max(size, 1))
        chunk = (*(min(group, count) for count in leading), *inner)
    return Array(name, dtype, (*leading, *inner), chunk, layout, recipes)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A file of an array: the unit of work."""

    state: pathlib.Path  # directory of all arrays
    array: Array
    at: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.array.name}:{'.'.join(map(str, self.at))}"

    @property
    def num_bytes(self) -> int:
        return self.array.chunk_bytes

    @property
    def file(self) -> pathlib.Path:
        return array_directory(self.state, self.array.name) / (".".join(map(str, self.at)) or "0")

    def begin(self) -> "_ChunkJob":
        return _ChunkJob(self)

    def verify(self, sums: Mapping[str, int]) -> bool:
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            is_whole = os.fstat(descriptor).st_size == self.num_bytes
            total = sum_on_disk(descriptor, (self.array.dtype, self.array.chunk), 0, self.file) if is_whole else None
            leave_page_cache(descriptor, 0, self.num_bytes)
        finally:
            os.close(descriptor)
        return total == sums[self.array.name]


class _ChunkJob:
    def __init__(self, chunk: Chunk):
        self._chunk = chunk
        self._sum = 0
        rows, recipe = self._rows(), chunk.array.recipes.flat[0]
        self.pieces = [Piece(chunk.num_bytes + len(rows) * recipe.row_bytes, self._run)]

    def _rows(self) -> range:
        """Of the tensors."""
        array = self._chunk.array
        slow = array.recipes.ndim + array.layout.ours.index(array.layout.theirs[0])
        begin = self._chunk.at[slow] * array.chunk[slow]
        step = row_step(array.layout, array.inner_shape)
        return range(begin * step, min(begin + array.chunk[slow], array.shape[slow]) * step)

    def _run(self) -> int:
        content = self._content()
        self._chunk.file.parent.mkdir(parents=True, exist_ok=True)
        with self._chunk.file.open("wb", buffering=0) as stream:
            left = content.reshape(-1).view(np.uint8).data
            while left:
                left = left[stream.write(left) :]
        self._sum = sum_of_words(content)
        return content.nbytes

    def _content(self) -> np.ndarray:
        array, rows = self._chunk.array, self._rows()
        leading = array.recipes.ndim
        inner = [
            len(rows) // row_step(array.layout, array.inner_shape) if d == array.layout.theirs[0] else n
            for d, n in zip(array.layout.ours, array.inner_shape, strict=True)
        ]
        parts = []
        for index in np.ndindex(array.chunk[:leading]):
            expert = tuple(i * n + k for i, n, k in zip(self._chunk.at, array.chunk, index, strict=False))
            if all(i < n for i, n in zip(expert, array.shape, strict=False)):
                ((_, tensor),) = array.recipes[expert].make(rows).values()
                parts.append((index, to_ours(tensor, array.layout).reshape(inner)))
        if len(parts) == 1 and parts[0][1].size == math.prod(array.chunk):
            return parts[0][1]
        content = np.zeros(array.chunk, array.dtype)  # chunks at the edge are as long as the others
        for index, part in parts:
            content[index][tuple(map(slice, inner))] = part
        return content

    def finish(self) -> dict[str, int]:
        return {self._chunk.array.name: self._sum}

    def abandon(self) -> None:
        pass  # what is not in the journal is written anew


def chunks(state: pathlib.Path, arrays: Sequence[Array]) -> Iterator[Chunk]:
    for array in arrays:
        counts = [range(math.ceil(n / c)) for n, c in zip(array.shape, array.chunk, strict=True)]
        for at in itertools.product(*counts):
            yield Chunk(state, array, at)


def array_directory(state: pathlib.Path, name: str) -> pathlib.Path:
    return state / name.replace("/", ".")


def write_metadata(
    step: pathlib.Path, arrays: Sequence[Array], sums: Mapping[str, int], config_json: dict, extra: dict
) -> None:
    """What makes the files a checkpoint: see `checkpoint` and `checkpoint_read`."""
    state = step / "state"
    for array in arrays:
        _write(array_directory(state, array.name) / ".zarray", _zarray(array))
    names = sorted(array.name for array in arrays)
    shapes = {array.name: list(array.shape) for array in arrays}
    tree = {str(tuple(name.split("/"))): _tree_entry(name.split("/"), shapes[name]) for name in names}
    settings = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    _write(state / "_METADATA", {"tree_metadata": tree, **settings, "custom_metadata": None})
    meta = {
        "step": 0,
        "config": config_json,
        "data_states": [{}],
        "extra": extra,
        "arrays": {array.name: [str(array.dtype), list(array.shape), sums[array.name]] for array in arrays},
    }
    _write(step / "meta" / "metadata", meta)


def _zarray(array: Array) -> dict[str, Any]:
    dtype = array.dtype
    standard = f"<{dtype.kind}{dtype.itemsize}" if dtype in (np.float32, np.float16) else str(dtype)
    return {
        "zarr_format": 2,
        "shape": list(array.shape),
        "chunks": list(array.chunk),
        "dtype": standard,
        "compressor": None,
        "fill_value": None,
        "order": "C",
        "filters": None,
        "dimension_separator": ".",
    }


def _tree_entry(keys: Sequence[str], shape: Sequence[int]) -> dict[str, Any]:
    value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)}
    return {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": value}


def _write(file: pathlib.Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
