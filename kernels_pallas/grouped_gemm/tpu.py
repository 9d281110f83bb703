"""The grouped products as Mosaic TPU kernels, after MegaBlox (arXiv 2211.15841). How rows are walked over: tpu_walk.py.

JAX's own megablox is not behind this: it cannot run inside a `shard_map` that checks types, takes rows in whole tiles only, leaves
rows beyond the last group as they were, and multiplies what they hold into gradients.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_gemm.tpu_walk import (
    BUFFER_BYTES,
    LANES,
    Here,
    Operand,
    Visits,
    call,
    dot,
    keep,
    result,
    rows_times_matrices,
)
from kernels_pallas.select import Unsupported

SUBLANES = 32  # of a tile of 8-bit numbers, the tallest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one step multiplies: [rows, inner] by [inner, columns]; for weights, [rows, inner]^T by [rows, columns]."""

    rows: int
    inner: int
    columns: int


def choose(rows: int, inner: int, columns: int, groups: int, itemsize: int) -> Tile:
    """All of the contraction at once while that fits: then each matrix is read once for every block of its columns."""
    tile_rows, tile_columns, tile_inner = choose_rows(rows, groups), even(columns, 1024), inner
    for steps in range(1, 1 + math.ceil(inner / LANES)):
        tile_inner = inner if steps == 1 else ceil(math.ceil(inner / steps), LANES)
        operands = 2 * itemsize * (tile_inner * (tile_rows + tile_columns) + tile_rows * tile_columns)
        if operands + 8 * tile_rows * tile_columns <= BUFFER_BYTES:
            break
    return Tile(rows=tile_rows, inner=tile_inner, columns=tile_columns)


def choose_weights(rows: int, inner: int, columns: int, groups: int) -> Tile:
    return Tile(rows=choose_rows(rows, groups), inner=even(inner, 1024), columns=even(columns, 1024))


def choose_rows(rows: int, groups: int) -> int:
    """As many as the average group has, rounded up: more would be multiplied for nothing."""
    return min(512, max(LANES, 1 << math.ceil(math.log2(max(1, rows / groups)))), ceil(rows, SUBLANES))


def forward(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """y_MF = x_MD @ w[group], in x's dtype; zeros beyond the last group. Raises Unsupported."""
    return _rows_times_matrices(x_MD, w_EDF, sizes_E, transpose=False)


def backward_rows(dy_MF: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """dx_MD = dy_MF @ w[group]^T, in dy's dtype; the matrices are read as they lie. Raises Unsupported."""
    return _rows_times_matrices(dy_MF, w_EDF, sizes_E, transpose=True)


def _rows_times_matrices(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transpose: bool) -> jax.Array:
    _check(x_MD, w_EDF)
    rows, inner = x_MD.shape
    groups, columns = w_EDF.shape[0], w_EDF.shape[1 if transpose else 2]
    tile = choose(rows, inner, columns, groups, x_MD.dtype.itemsize)
    w_axis = 1 if transpose else 0

    def product(step, x_ref, w_ref):
        if inner % tile.inner:
            left = inner - step * tile.inner
            return dot(keep(x_ref[...], 1, 0, left), keep(w_ref[...], w_axis, 0, left), 1, w_axis)
        at_once = _at_once(tile.inner)
        if at_once == tile.inner:
            return dot(x_ref[...], w_ref[...], 1, w_axis)

        def add(i, sums):
            terms = pl.ds(pl.multiple_of(i * at_once, LANES), at_once)
            return sums + dot(x_ref[:, terms], w_ref[:, terms] if transpose else w_ref[terms, :], 1, w_axis)

        return jax.lax.fori_loop(0, tile.inner // at_once, add, jnp.zeros((tile.rows, tile.columns), jnp.float32))

    if transpose:
        w = Operand(w_EDF, (None, tile.columns, tile.inner), lambda i, group, j, k: (group, j, k))
    else:
        w = Operand(w_EDF, (None, tile.inner, tile.columns), lambda i, group, j, k: (group, k, j))
    return rows_times_matrices(
        product,
        [Operand(x_MD, (tile.rows, tile.inner), lambda i, group, j, k: (i, k)), w],
        sizes_E,
        tile=(tile.rows, tile.columns),
        shape=(rows, columns),
        steps=pl.cdiv(inner, tile.inner),
        dtype=x_MD.dtype,
        name="grouped_gemm_backward_rows" if transpose else "grouped_gemm",
    )


def backward_weights(x_MD: jax.Array, dy_MF: jax.Array, sizes_E: jax.Array, dtype: Any) -> jax.Array:
    """dw_EDF[e] = x_e^T dy_e over the rows of group e; zeros for an empty group. Raises Unsupported."""
    _check(x_MD, dy_MF)
    (rows, inner), columns, groups = x_MD.shape, dy_MF.shape[1], sizes_E.shape[0]
    tile = choose_weights(rows, inner, columns, groups)
    visits = Visits.of(sizes_E, rows, tile.rows, every_group=True)

    def kernel(group_V, tile_V, starts_E, x_ref, dy_ref, dw_ref, sums_ref):
        here = Here.of(pl.program_id(2), group_V, tile_V, starts_E, tile.rows)

        @pl.when(here.first_of_group)
        def _():
            sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

        @pl.when(here.some & here.whole)
        def _():
            sums_ref[...] += dot(x_ref[...], dy_ref[...], 0, 0)

        @pl.when(here.some & ~here.whole)
        def _():
            x, dy = (keep(ref[...], 0, here.start, here.end) for ref in (x_ref, dy_ref))
            sums_ref[...] += dot(x, dy, 0, 0)

        @pl.when(here.last_of_group)
        def _():
            dw_ref[...] = sums_ref[...].astype(dw_ref.dtype)

    def rows_spec(width: int, axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((tile.rows, width), lambda i, j, v, group_V, tile_V, _: (tile_V[v], (i, j)[axis]))

    return call(
        kernel,
        visits,
        grid=(pl.cdiv(inner, tile.inner), pl.cdiv(columns, tile.columns), visits.most),
        in_specs=[rows_spec(tile.inner, 0), rows_spec(tile.columns, 1)],
        out_specs=pl.BlockSpec((None, tile.inner, tile.columns), lambda i, j, v, group_V, *_: (group_V[v], i, j)),
        out_shape=result((groups, inner, columns), dtype, x_MD),
        scratch_shapes=[pltpu.VMEM((tile.inner, tile.columns), jnp.float32)],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        inner=rows,
        name="grouped_gemm_backward_weights",
    )(x_MD, dy_MF)


def _check(a: jax.Array, b: jax.Array) -> None:
    if a.dtype != b.dtype or a.dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(f"grouped_gemm on TPU takes bfloat16 or float32, not {a.dtype} and {b.dtype}; 'xla' does")


def _at_once(inner: int) -> int:
    """Terms of a sum in one piece of code, an even part of `inner` if that has one: compilers take long for more."""
    parts = (size for size in range(2048, 511, -LANES) if inner % size == 0)
    return inner if inner <= 2048 else next(parts, inner)


def ceil(length: int, size: int) -> int:
    return math.ceil(length / size) * size


def even(length: int, most: int) -> int:
    """Size of as few equal parts of at most `most` as hold `length`, in whole registers; the length itself if it is one part."""
    return length if length <= most else ceil(math.ceil(length / math.ceil(length / most)), LANES)
