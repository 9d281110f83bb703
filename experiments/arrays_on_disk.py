"""Single arrays of a checkpoint, read without restoring it: slices of them, and those kept in FP8 as plain numbers."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from kernels_pallas.fp8.host import BLOCK
from mdl.hf import fp8
from mdl.hf.table import Layout

_CACHE_BYTES = 256_000_000  # of decoded chunks, for arrays whose chunks are larger than what is read of them at a time


class ArraysOnDisk:
    """The arrays in the `state` of a step, as Orbax lays them out, by name."""

    def __init__(self, state: pathlib.Path):
        import tensorstore

        self._state = state
        self._ocdbt: bool = json.loads((state / "_METADATA").read_text())["use_ocdbt"]
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def open(self, name: str) -> Any:
        """A TensorStore of the array."""
        import tensorstore

        key = name.replace("/", ".")
        if self._ocdbt:
            kvstore = {"driver": "ocdbt", "base": f"file://{self._state}/", "path": f"{key}/"}
        else:
            kvstore = {"driver": "file", "path": f"{self._state / key}/"}
        spec = {"driver": "zarr", "kvstore": kvstore}
        return tensorstore.open(spec, read=True, context=self._context).result()

    def dequantized(self, name: str, dims: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """float32(FP8) * scale in the dtype and on the sharding of `leaf`; of the array, each process reads what its devices hold.

        dims: the Layout between the matrix whose 128x128 blocks have the scales, and the array without its leading dims.
        """
        data, scale = self.open(name), self.open(fp8.scale_name(name)).read().result()
        layout = Layout(dims)

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or ()
            part = data[index].read().result()
            leading = part.ndim - len(layout.ours)
            ranges = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
            blocks = _blocks(layout, ranges[leading:], leaf.shape[leading:])
            result = np.empty(part.shape, leaf.dtype)
            for at in np.ndindex(part.shape[:leading]):
                own = scale[tuple(r[i] for r, i in zip(ranges, at, strict=False))].astype(np.float32)
                result[at] = (part[at].astype(np.float32) * own[blocks]).astype(leaf.dtype)
            return result

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)


def _blocks(layout: Layout, wanted: list[range], shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """For each element of ours, row and column of its block in the scales."""
    sizes, index = dict(zip(layout.ours, shape, strict=True)), dict(zip(layout.ours, wanted, strict=True))
    found = []
    for group in layout.groups:
        position = np.zeros([1] * len(layout.ours), np.int32)
        for dim in group:
            steps = np.array(index[dim], np.int32).reshape([-1 if d == dim else 1 for d in layout.ours])
            position = position * sizes[dim] + steps
        found.append(position // BLOCK)
    return tuple(found)
