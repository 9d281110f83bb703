"""The FP8 formats as Mosaic TPU kernels: one pass over device memory, double-buffered."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.fp8.scale import MAX, divide, scale_of
from kernels_pallas.select import Unsupported

LANES = 128  # of a vector register, and the width of every block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one step works on; weights take rows = 128, one row of blocks."""

    rows: int = 256
    columns: int = 1024

    def __post_init__(self):
        if self.rows < 1 or self.columns < 1 or self.rows % 32 or self.columns % LANES:
            raise ValueError(f"{self}: native tiles of FP8 are 32 x {LANES}; rows and columns must be multiples")
        if self.rows * self.columns > 2**19:
            raise ValueError(f"{self} is more than 2 MiB of float32: buffers and results would not fit into every VMEM")


def quantize(
    x_MN: jax.Array, block: tuple[int, int], ue8m0: bool, amax_floor: float, tile: Tile = Tile()
) -> tuple[jax.Array, jax.Array]:
    """(data, scale) as the public functions promise; `x_MN` may have leading dims."""
    plan = _Plan.of(x_MN.shape, x_MN.dtype, block, tile)
    if not x_MN.size:
        return jnp.zeros(x_MN.shape, jnp.float8_e4m3fn), jnp.zeros(plan.scale_shape, jnp.float32)

    def kernel(x_ref, data_ref, scale_ref):
        for columns, block_column in plan.blocks():
            x = x_ref[:, columns].astype(jnp.float32)
            finite = jnp.abs(x) < jnp.inf
            magnitude = jnp.where(finite & plan.inside(columns), jnp.abs(x), 0)
            amax = jnp.max(magnitude, axis=1, keepdims=True)
            if block[0] > 1:
                amax = jnp.max(amax, axis=0, keepdims=True)
            scale = scale_of(amax, ue8m0, amax_floor)
            y = jnp.clip(divide(x, scale, finite, ue8m0), -MAX, MAX)
            y = jnp.where(finite, y, jnp.nan)
            data_ref[:, columns] = y.astype(jnp.float8_e4m3fn)
            # The scales stay in VMEM until a row of tiles is done.
            lane = jax.lax.broadcasted_iota(jnp.int32, scale_ref.shape, 1)
            scale_ref[...] = jnp.where(lane == block_column, scale, scale_ref[...])

    data, scale = plan.call(
        kernel,
        in_specs=[plan.spec],
        out_specs=(plan.spec, plan.scale_spec),
        out_shape=(plan.result(plan.view, jnp.float8_e4m3fn, x_MN), plan.result(plan.scale_view, jnp.float32, x_MN)),
        name="fp8_quantize",
    )(x_MN.reshape(plan.view))
    return data.reshape(x_MN.shape), scale.reshape(plan.scale_shape)


def dequantize(
    data_MN: jax.Array, scale: jax.Array, block: tuple[int, int], dtype: jnp.dtype, tile: Tile = Tile()
) -> jax.Array:
    """float32(data) * scale, rounded once to `dtype`; `data_MN` may have leading dims."""
    plan = _Plan.of(data_MN.shape, dtype, block, tile)
    if not data_MN.size:
        return jnp.zeros(data_MN.shape, dtype)

    def kernel(data_ref, scale_ref, y_ref):
        lane = jax.lax.broadcasted_iota(jnp.int32, scale_ref.shape, 1)
        for columns, block_column in plan.blocks():
            # One column of the scales: a sum with zeros is exact.
            scale = jnp.sum(jnp.where(lane == block_column, scale_ref[...], 0), axis=1, keepdims=True)
            y_ref[:, columns] = (data_ref[:, columns].astype(jnp.float32) * scale).astype(dtype)

    y = plan.call(
        kernel,
        in_specs=[plan.spec, plan.scale_spec],
        out_specs=plan.spec,
        out_shape=plan.result(plan.view, dtype, data_MN),
        name="fp8_dequantize",
    )(data_MN.reshape(plan.view), scale.astype(jnp.float32).reshape(plan.scale_view))
    return y.reshape(data_MN.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the steps of a kernel cover an array; its edges may lie anywhere within the last tiles."""

    scale_shape: tuple[int, ...]
    batch: int
    M: int
    N: int
    block_rows: int
    rows: int  # of a step
    columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: Any, block: tuple[int, int], tile: Tile) -> "_Plan":
        if dtype == jnp.float16:
            raise Unsupported("fp8 on TPU takes and gives bfloat16 and float32: Mosaic TPU has no float16")
        *leading, M, N = shape
        scale_shape = (*leading, pl.cdiv(M, block[0]), pl.cdiv(N, LANES))
        if block[0] == 1:  # each row for itself: as few and as tall as can be
            leading, M = [], math.prod(leading) * M
        rows = tile.rows if block[0] == 1 else block[0]
        return cls(
            scale_shape=scale_shape,
            batch=math.prod(leading),
            M=M,
            N=N,
            block_rows=block[0],
            rows=min(rows, M),  # a dim may be one tile of any size
            columns=min(tile.columns, N),
        )

    @property
    def view(self) -> tuple[int, ...]:
        return self.batch, self.M, self.N

    @property
    def spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.rows, self.columns), lambda b, i, j: (b, i, j))

    @property
    def scale_view(self) -> tuple[int, ...]:
        """A row of blocks has one row of scales; a dim of its own lets a step hold just that one."""
        column_blocks = self.scale_shape[-1]
        if self.block_rows == 1:
            return self.batch, self.M, column_blocks
        return self.batch, pl.cdiv(self.M, self.block_rows), 1, column_blocks

    @property
    def scale_spec(self) -> pl.BlockSpec:
        """All columns, whatever the column of the step: Mosaic takes blocks of 128 lanes or of the whole dim."""
        if self.block_rows == 1:
            return pl.BlockSpec((None, self.rows, self.scale_shape[-1]), lambda b, i, j: (b, i, 0))
        return pl.BlockSpec((None, None, 1, self.scale_shape[-1]), lambda b, i, j: (b, i, 0, 0))

    def blocks(self) -> Iterator[tuple[slice, jax.Array]]:
        """In a kernel: each block's columns of the tile, and its column in the grid of blocks."""
        first = pl.program_id(2) * pl.cdiv(self.columns, LANES)
        for number, start in enumerate(range(0, self.columns, LANES)):
            yield slice(start, min(start + LANES, self.columns)), first + number

    def inside(self, columns: slice) -> jax.Array | bool:
        """In a kernel: which elements of these columns of the tile are in the array, for maxima over more than one row."""
        shape = self.rows, columns.stop - columns.start
        row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        inside = True
        if self.block_rows > 1 and self.M % self.rows:
            inside = row < self.M - pl.program_id(1) * self.rows
        if self.N % self.columns:
            inside &= column < self.N - pl.program_id(2) * self.columns - columns.start
        return inside

    def result(self, shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
        """In shard_map, results vary over the mesh axes that `like` varies over."""
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)

    def call(self, kernel: Callable, **arguments: Any) -> Callable:
        return pl.pallas_call(
            kernel,
            grid=(self.batch, pl.cdiv(self.M, self.rows), pl.cdiv(self.N, self.columns)),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            **arguments,
        )
