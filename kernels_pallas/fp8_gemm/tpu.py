"""The FP8 products as a Mosaic TPU kernel. How rows are walked over: grouped_gemm/tpu_walk.py.

Of few rows, FP8 goes into the matrix units as it is (tpu7x multiplies it, in chips before it they make bfloat16 of it first), and
sums over 128 terms are scaled and added up in float32. Of many rows that is more work than dequantizing: values are made in VMEM,
in the dtype of the result, exact where scales are powers of two.
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.fp8 import BLOCK
from kernels_pallas.grouped_gemm.tpu import Tile, ceil, choose_rows, even
from kernels_pallas.grouped_gemm.tpu_walk import LANES, Operand, dot, keep, rows_times_matrices
from kernels_pallas.select import Unsupported

MOST = 1024  # terms at a time, 8 blocks: what rows of scales have to be a multiple of
PROMOTED = 256  # rows of a tile at most; with 512, by count of bundles, tpu7x takes a fifth more than for dequantizing


def choose(rows: int, inner: int, columns: int, groups: int) -> Tile:
    tile_inner = MOST if inner > 2 * MOST else ceil(inner, BLOCK)
    tile_rows = ceil(choose_rows(rows, groups), LANES)  # whose scales lie along lanes
    return Tile(rows=tile_rows, inner=tile_inner, columns=ceil(even(columns, 1024), BLOCK))


def forward(
    x_MD: jax.Array,
    x_scale: jax.Array,
    w_EFD: jax.Array,
    w_scale: jax.Array,
    sizes_E: jax.Array,
    *,
    dtype: jnp.dtype,
) -> jax.Array:
    """y_MF = x_MD @ w[group]^T; zeros beyond the last group. Raises Unsupported."""
    if dtype == jnp.float16:
        raise Unsupported("fp8_grouped_gemm on TPU gives bfloat16 and float32, not float16; 'xla' does")
    (rows, inner), (groups, columns, _) = x_MD.shape, w_EFD.shape
    tile = choose(rows, inner, columns, groups)
    steps, across, down = pl.cdiv(inner, tile.inner), tile.inner // BLOCK, tile.columns // BLOCK

    def dequantized(step, x_ref, x_scale_ref, w_ref, w_scale_ref):
        x_scale = x_scale_ref[...].T
        x, w = [], []
        for b in range(across):
            terms = slice(b * BLOCK, (b + 1) * BLOCK)
            x.append((x_ref[:, terms].astype(jnp.float32) * x_scale[:, b : b + 1]).astype(dtype))
            blocks = [w_ref[d * BLOCK : (d + 1) * BLOCK, terms].astype(jnp.float32) for d in range(down)]
            blocks = [(block * w_scale_ref[0, d * across + b]).astype(dtype) for d, block in enumerate(blocks)]
            w.append(jnp.concatenate(blocks, axis=0))
        x, w = jnp.concatenate(x, axis=1), jnp.concatenate(w, axis=1)
        if inner % tile.inner:
            left = inner - step * tile.inner
            x, w = keep(x, 1, 0, left), keep(w, 1, 0, left)
        return dot(x, w, 1, 1)

    def promoted(step, x_ref, x_scale_ref, w_ref, w_scale_ref):
        """[columns, rows]: rows lie along lanes as their scales do, and a scale of the matrix is a number there."""
        turned = []
        for first in range(0, tile.rows, LANES):
            rows = slice(first, first + LANES)
            sums = jnp.zeros((tile.columns, LANES), jnp.float32)
            for b in range(across):
                terms = slice(b * BLOCK, (b + 1) * BLOCK)
                x, w = x_ref[rows, terms], w_ref[:, terms]
                if inner % tile.inner:
                    left = inner - step * tile.inner - b * BLOCK
                    x, w = _keep(x, left), _keep(w, left)
                blocks, x_scale = dot(w, x, 1, 1), x_scale_ref[b : b + 1, rows]
                scales = [x_scale * w_scale_ref[0, d * across + b] for d in range(down)]
                blocks = [blocks[d * BLOCK : (d + 1) * BLOCK] * scale for d, scale in enumerate(scales)]
                sums += jnp.concatenate(blocks, axis=0)
            turned.append(sums)
        return jnp.concatenate(turned, axis=1)

    few = tile.rows <= PROMOTED
    return rows_times_matrices(
        promoted if few else dequantized,
        [
            Operand(x_MD, (tile.rows, tile.inner), lambda i, group, j, k: (i, k)),
            Operand(_pad(x_scale, 1, across).T, (across, tile.rows), lambda i, group, j, k: (k, i)),
            Operand(w_EFD, (None, tile.columns, tile.inner), lambda i, group, j, k: (group, j, k)),
            # Scalars of a tile, which is a dim of its own.
            Operand(
                _tiles(w_scale, down, across),
                (None, None, None, 1, down * across),
                lambda i, group, j, k: (group, j, k, 0, 0),
                pltpu.SMEM,
            ),
        ],
        sizes_E,
        tile=(tile.rows, tile.columns),
        shape=(rows, columns),
        steps=steps,
        dtype=dtype,
        name="fp8_grouped_gemm",
        turned=few,
    )


def _tiles(scale: jax.Array, down: int, across: int) -> jax.Array:
    """[E, tiles of columns, steps, 1, blocks of a tile]"""
    scale = _pad(_pad(scale, 1, down), 2, across)
    groups, columns, inner = scale.shape
    scale = scale.reshape(groups, columns // down, down, inner // across, across).swapaxes(2, 3)
    return scale.reshape(*scale.shape[:3], 1, down * across)


def _keep(data: jax.Array, end: jax.Array) -> jax.Array:
    """Zeros from column `end` on, in FP8, of which Mosaic selects nothing."""
    return pltpu.bitcast(keep(pltpu.bitcast(data, jnp.int8), 1, 0, end), data.dtype)


def _pad(a: jax.Array, axis: int, multiple: int) -> jax.Array:
    return jnp.pad(a, [(0, -a.shape[axis] % multiple if i == axis else 0) for i in range(a.ndim)])
