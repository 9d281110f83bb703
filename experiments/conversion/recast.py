"""What becomes of each tensor: copied, cast, dequantized or quantized, some rows at a time, in the layout of the files."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from experiments.conversion import blocks
from experiments.conversion.arrays import Size, num_bytes
from experiments.conversion.sources import Source
from mdl.hf import fp8

Rows = dict[str, tuple[int, np.ndarray]]  # by name of the tensor: first row, and rows from there


class Recipe(Protocol):
    """Makes a tensor of the target, or a matrix and its scales, from the source."""

    @property
    def sizes(self) -> Mapping[str, Size]: ...

    @property
    def row_step(self) -> int:
        """Rows are made in multiples of so many."""
        ...

    @property
    def row_bytes(self) -> int:
        """Memory that the making of one row takes."""
        ...

    def make(self, rows: range) -> Rows:
        """Rows of the first tensor, and what belongs to them of the second."""
        ...


@dataclasses.dataclass(frozen=True)
class Cast:
    """The tensor, in another dtype or the same."""

    source: Source
    name: str
    dtype: np.dtype

    @property
    def sizes(self) -> Mapping[str, Size]:
        return {self.name: (self.dtype, self.source.sizes[self.name][1])}

    @property
    def row_step(self) -> int:
        return self.source.row_step(self.name)

    @property
    def row_bytes(self) -> int:
        dtype, shape = self.source.sizes[self.name]
        return num_bytes((dtype, shape[1:])) + num_bytes((self.dtype, shape[1:]))

    def make(self, rows: range) -> Rows:
        return {self.name: (rows.start, self.source.read(self.name, rows).astype(self.dtype, copy=False))}


@dataclasses.dataclass(frozen=True)
class Dequantize(Cast):
    """float32(FP8) * scale, rounded once to `dtype`."""

    @property
    def row_step(self) -> int:
        return math.lcm(fp8.BLOCK, self.source.row_step(self.name))

    def make(self, rows: range) -> Rows:
        data, scale = self.source.read(self.name, rows), self.source.read(fp8.scale_name(self.name), _blocks(rows))
        if scale.dtype == ml_dtypes.bfloat16:
            scale = scale.astype(np.float32)
        return {self.name: (rows.start, blocks.dequantize(data, scale, self.dtype))}


@dataclasses.dataclass(frozen=True)
class Quantize:
    """FP8 and a float32 scale for each block of 128x128."""

    source: Source
    name: str
    ue8m0: bool

    @property
    def sizes(self) -> Mapping[str, Size]:
        _, shape = self.source.sizes[self.name]
        scale = np.dtype(np.float32), fp8.scale_shape(shape)
        return {self.name: (fp8.DTYPE, shape), fp8.scale_name(self.name): scale}

    @property
    def row_step(self) -> int:
        return math.lcm(fp8.BLOCK, self.source.row_step(self.name))

    @property
    def row_bytes(self) -> int:
        dtype, shape = self.source.sizes[self.name]
        return num_bytes((dtype, shape[1:])) + 2 * num_bytes((fp8.DTYPE, shape[1:]))

    def make(self, rows: range) -> Rows:
        data, scale = blocks.quantize(self.source.read(self.name, rows), ue8m0=self.ue8m0)
        return {self.name: (rows.start, data), fp8.scale_name(self.name): (_blocks(rows).start, scale)}


def _blocks(rows: range) -> range:
    """Rows of scales; `rows` begins with a block and ends with one, or with the matrix."""
    return range(rows.start // fp8.BLOCK, -(-rows.stop // fp8.BLOCK))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recast:
    """What was asked for."""

    dtype: np.dtype | None  # of parameters; None keeps what each has, FP8 included
    quantizes: bool = False  # matrices that published files hold in FP8
    ue8m0: bool = False  # scales are powers of two

    def recipes(self, source: Source, buffers: set[str]) -> Iterator[Recipe]:
        """One for each tensor of the target; those in `buffers`, such as a router's bias, keep their dtype."""
        scales = {fp8.scale_name(name) for name, (dtype, _) in source.sizes.items() if dtype == fp8.DTYPE}
        for name, (dtype, shape) in source.sizes.items():
            is_float8 = dtype == fp8.DTYPE
            if name in scales and self.dtype is not None:
                continue
            if self.quantizes and not is_float8 and is_quantized(name, shape):
                yield Quantize(source, name, self.ue8m0)
            elif is_float8 and self.dtype is not None:
                yield Dequantize(source, name, self.dtype)
            else:
                keeps = name in buffers or name in scales
                yield Cast(source, name, dtype if keeps or self.dtype is None else self.dtype)


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether published FP8 checkpoints hold this tensor in FP8: the matrices of attention, MLPs and experts.

    Not embedding, head, norms, the router, MTP's eh_proj, and of the indexer not weights_proj.
    """
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    is_projection = last.endswith(("_proj", "_proj_with_mqa")) or (
        parent.endswith(".indexer") and last in ("wq_b", "wk")
    )
    return len(shape) == 2 and name.endswith(".weight") and is_projection and last not in ("eh_proj", "weights_proj")
