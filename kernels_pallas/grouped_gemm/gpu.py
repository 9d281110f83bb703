"""The grouped products as Mosaic GPU kernels (Hopper), in 16-bit numbers. How tiles are walked over: turns.py."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.hopper import ROWS, SHARED_MEMORY, pad
from kernels_pallas.grouped_gemm.layout import take_rows
from kernels_pallas.grouped_gemm.turns import PART, TILE_ROWS, Ring, Visits, at_least, kernel, smem, take_turns
from kernels_pallas.select import Unsupported

WIDTH = 64  # terms of a sum at a time: 16-bit numbers in 128 bytes, the swizzle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """128 rows by `columns` of a result, WIDTH terms of its sums at a time, `stages` of such steps on their way or in use."""

    columns: int
    stages: int = 4

    def __post_init__(self):
        if self.columns % WIDTH or not WIDTH <= self.columns <= 256 or self.stages < 2:
            raise ValueError(f"{self}: columns must be 64, 128, 192 or 256, and stages at least 2")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self} needs {self.shared_memory} bytes of shared memory; a block has {SHARED_MEMORY}")

    @property
    def shared_memory(self) -> int:
        steps = self.stages * WIDTH * (TILE_ROWS + self.columns)
        results = 2 * TILE_ROWS * PART
        return 2 * (steps + results) + 1024  # barriers


def choose(columns: int) -> Tile:
    """As few tiles as can be, and these even."""
    parts = math.ceil(columns / 256)
    return Tile(columns=math.ceil(columns / parts / WIDTH) * WIDTH)


def forward(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """y_MF = x_MD @ w[group], in x's dtype; zeros beyond the last group. Raises Unsupported."""
    return _rows_times_matrices(x_MD, w_EDF, sizes_E, transpose=False)


def backward_rows(dy_MF: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """dx_MD = dy_MF @ w[group]^T, in dy's dtype; the matrices are read as they lie. Raises Unsupported."""
    return _rows_times_matrices(dy_MF, w_EDF, sizes_E, transpose=True)


def _rows_times_matrices(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transpose: bool) -> jax.Array:
    check(x_MD.dtype, w_EDF.dtype)
    shape = x_MD.shape[0], w_EDF.shape[1 if transpose else 2]
    x_MD, w_EDF = at_least(pad(x_MD, 1, WIDTH), 0, TILE_ROWS), pad(pad(w_EDF, 1, WIDTH), 2, WIDTH)
    rows, inner = x_MD.shape
    groups, columns, dtype = w_EDF.shape[0], w_EDF.shape[1 if transpose else 2], x_MD.dtype
    tile = choose(columns)
    visits, tiles = Visits.of(sizes_E, rows), pl.cdiv(columns, tile.columns)

    def grouped_gemm(x_gmem, w_gmem, group_gmem, row_gmem, end_gmem, count_gmem, y_gmem, x_smem, w_smem, staging, ring):
        w = jax.lax.axis_index("warpgroup")

        def place(item):
            visit, j = jax.lax.div(item, jnp.int32(tiles)), jax.lax.rem(item, jnp.int32(tiles))
            return Place.within(visit, row_gmem[visit], rows, j, tile, columns)

        def steps_of(item):
            # Rows beyond the last group: no product, and zeros are stored.
            return jnp.where(group_gmem[place(item).number] < groups, inner // WIDTH, 0)

        def bring(item, step, slot, here):
            own = place(item)
            at, there = pl.ds(step * WIDTH, WIDTH), pl.ds(own.first_column, tile.columns)
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(own.first_row, TILE_ROWS), at], x_smem.at[slot], here)
            w_at = (there, at) if transpose else (at, there)
            plgpu.copy_gmem_to_smem(w_gmem.at[group_gmem[own.number], *w_at], w_smem.at[slot], here)

        def multiply(sums, slot):
            b = w_smem.at[slot].T if transpose else w_smem.at[slot]
            plgpu.wgmma(sums, x_smem.at[slot, pl.ds(w * ROWS, ROWS)], b)

        def store(item, sums):
            own = place(item)
            first_row = own.first_row + w * ROWS
            end = jnp.minimum(end_gmem[own.number], own.row + TILE_ROWS)
            start, end = (jnp.clip(at - first_row, 0, ROWS) for at in (own.row, end))
            for part in range(tile.columns // PART):
                at = own.first_column + part * PART
                y = sums[:, part * PART : (part + 1) * PART].astype(dtype)
                target = y_gmem.at[:, pl.ds(at, PART)]
                pl.when(at >= own.column)(functools.partial(staging.store, y, target, first_row, start, end))

        sum_of = _add_products(ring, multiply, tile.columns)
        take_turns(ring, count_gmem[0] * tiles, steps_of=steps_of, bring=bring, sum_of=sum_of, store=store)

    y_MF = kernel(
        grouped_gemm,
        out_type=jax.ShapeDtypeStruct((rows, columns), dtype),
        operands=[
            smem((tile.stages, TILE_ROWS, WIDTH), dtype),
            smem((tile.stages, tile.columns, WIDTH) if transpose else (tile.stages, WIDTH, tile.columns), dtype),
        ],
        copies=2,
        dtype=dtype,
        stages=tile.stages,
    )(x_MD, w_EDF, visits.group_V, visits.row_V, visits.end_V, visits.count)
    return y_MF[: shape[0], : shape[1]]


def backward_weights(x_MD: jax.Array, dy_MF: jax.Array, sizes_E: jax.Array, dtype: Any) -> jax.Array:
    """dw_EDF[e] = x_e^T dy_e over the rows of group e; zeros for an empty group. Raises Unsupported.

    What is left of a group beside steps of 64 rows is copied to a place of its own, with zeros behind.
    """
    check(x_MD.dtype, dy_MF.dtype)
    check(x_MD.dtype, jnp.dtype(dtype))
    shape = len(sizes_E), x_MD.shape[1], dy_MF.shape[1]
    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    starts_E, whole_E = ends_E - sizes_E, sizes_E // WIDTH * WIDTH
    rest_ER = (starts_E + whole_E)[:, None] + jnp.arange(WIDTH, dtype=jnp.int32)
    rest_ER = jnp.where(rest_ER < ends_E[:, None], rest_ER, len(x_MD))
    x_MD, dy_MF = at_least(pad(x_MD, 1, WIDTH), 1, TILE_ROWS), pad(dy_MF, 1, WIDTH)
    x_ERD, dy_ERF = take_rows(x_MD, rest_ER), take_rows(dy_MF, rest_ER)
    x_MD, dy_MF = (at_least(a, 0, WIDTH) for a in (x_MD, dy_MF))
    groups, rows, columns = shape[0], x_MD.shape[1], dy_MF.shape[1]
    tile = choose(columns)
    tiles = pl.cdiv(rows, TILE_ROWS), pl.cdiv(columns, tile.columns)

    def grouped_gemm_weights(
        x_gmem, dy_gmem, x_rest, dy_rest, start_gmem, size_gmem, dw_gmem, x_smem, dy_smem, staging, ring
    ):
        w = jax.lax.axis_index("warpgroup")

        def place(item):
            item, j = jax.lax.div(item, jnp.int32(tiles[1])), jax.lax.rem(item, jnp.int32(tiles[1]))
            group, i = jax.lax.div(item, jnp.int32(tiles[0])), jax.lax.rem(item, jnp.int32(tiles[0]))
            return Place.within(group, i * TILE_ROWS, rows, j, tile, columns)

        def steps_of(item):
            return jax.lax.div(size_gmem[place(item).number] + (WIDTH - 1), jnp.int32(WIDTH))

        def bring(item, step, slot, here):
            own = place(item)
            x_at, dy_at = pl.ds(own.first_row, TILE_ROWS), pl.ds(own.first_column, tile.columns)
            is_whole = (step + 1) * WIDTH <= size_gmem[own.number]

            @pl.when(is_whole)
            def _():
                terms = pl.ds(start_gmem[own.number] + step * WIDTH, WIDTH)
                plgpu.copy_gmem_to_smem(x_gmem.at[terms, x_at], x_smem.at[slot], here)
                plgpu.copy_gmem_to_smem(dy_gmem.at[terms, dy_at], dy_smem.at[slot], here)

            @pl.when(jnp.logical_not(is_whole))
            def _():
                plgpu.copy_gmem_to_smem(x_rest.at[own.number, :, x_at], x_smem.at[slot], here)
                plgpu.copy_gmem_to_smem(dy_rest.at[own.number, :, dy_at], dy_smem.at[slot], here)

        def multiply(sums, slot):
            plgpu.wgmma(sums, x_smem.at[slot, :, pl.ds(w * ROWS, ROWS)].T, dy_smem.at[slot])

        def store(item, sums):
            own = place(item)
            first_row = own.first_row + w * ROWS
            for part in range(tile.columns // PART):
                at = own.first_column + part * PART
                dw = sums[:, part * PART : (part + 1) * PART].astype(dtype)
                target = dw_gmem.at[own.number, :, pl.ds(at, PART)]
                is_new = (at >= own.column) & (first_row >= own.row)
                pl.when(is_new)(functools.partial(staging.store_whole, dw, target, first_row))

        sum_of = _add_products(ring, multiply, tile.columns)
        take_turns(
            ring, jnp.int32(groups * math.prod(tiles)), steps_of=steps_of, bring=bring, sum_of=sum_of, store=store
        )

    dw_EDF = kernel(
        grouped_gemm_weights,
        out_type=jax.ShapeDtypeStruct((groups, rows, columns), dtype),
        operands=[smem((tile.stages, WIDTH, TILE_ROWS), dtype), smem((tile.stages, WIDTH, tile.columns), dtype)],
        copies=2,
        dtype=dtype,
        stages=tile.stages,
    )(x_MD, dy_MF, x_ERD, dy_ERF, starts_E, sizes_E)
    return dw_EDF[:, : shape[1], : shape[2]]


def check(a: Any, b: Any) -> None:
    if a != b or a not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"grouped_gemm on gpu takes bfloat16 or float16, not {a} and {b}; 'xla' does")


class Place(NamedTuple):
    """Of a tile: moved to lie within the arrays, where that takes in rows and columns of the one before."""

    number: jax.Array  # of its visit, or group
    row: jax.Array
    first_row: jax.Array  # where it is computed
    column: jax.Array
    first_column: jax.Array

    @classmethod
    def within(cls, number: jax.Array, row: jax.Array, rows: int, j: jax.Array, tile: Tile, columns: int) -> "Place":
        column = j * tile.columns
        first_row, first_column = jnp.minimum(row, rows - TILE_ROWS), jnp.minimum(column, columns - tile.columns)
        return cls(number, row, first_row, column, first_column)


def _add_products(ring: Ring, multiply: Callable, columns: int) -> Callable:
    """For `take_turns`: one product is always on its way, and the operands of the one before are released."""

    def sum_of(item, steps, done):
        def add(sums):
            def step(i, _):
                ring.await_here(done + i)
                multiply(sums, ring.slot(done + i))
                plgpu.wgmma_wait(1)
                pl.when(i > 0)(lambda: ring.release(done + i - 1))
                return ()

            jax.lax.fori_loop(0, steps, step, ())
            plgpu.wgmma_wait(0)
            pl.when(steps > 0)(lambda: ring.release(done + steps - 1))
            return sums[...]

        return pl.run_scoped(add, plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32))

    return sum_of
