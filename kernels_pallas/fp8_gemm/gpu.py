"""The FP8 products as a Mosaic GPU kernel (Hopper), after DeepGEMM's promotion. How tiles are walked over: grouped_gemm/turns.py.

Tensor cores add up 128 terms, their sum is scaled and added in float32 by other units: one warpgroup does the latter while the
other's product is on its way.
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.hopper import PER_ROW, ROWS, TILE, across, full, multiply, pad
from kernels_pallas.fp8 import BLOCK
from kernels_pallas.grouped_gemm.turns import PART, TILE_ROWS, Visits, at_least, kernel, smem, take_turns
from kernels_pallas.select import Unsupported

STAGES = 5  # of 33 KB


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
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"fp8_grouped_gemm on gpu gives bfloat16 or float16, not {dtype}; 'xla' does")
    shape = x_MD.shape[0], w_EFD.shape[1]
    x_MD, x_scale = (at_least(a, 0, TILE_ROWS) for a in (pad(x_MD, 1, BLOCK), x_scale))
    w_EFD = pad(pad(w_EFD, 1, BLOCK), 2, BLOCK)
    rows, columns, groups = len(x_MD), w_EFD.shape[1], len(w_EFD)
    steps, tiles = x_MD.shape[1] // BLOCK, columns // BLOCK
    visits = Visits.of(sizes_E, rows)
    scale_KM = pad(x_scale.T, 1, 4)  # those of a tile side by side, in rows of whole 16 bytes

    def fp8_grouped_gemm(
        x_gmem, w_gmem, scale_gmem, w_scale_gmem, group_gmem, row_gmem, end_gmem, count_gmem, y_gmem, *scratch
    ):
        x_smem, w_smem, scale_smem, staging, ring = scratch
        own_rows = pl.ds(jax.lax.axis_index("warpgroup") * ROWS, ROWS)

        def place(item):
            """Group, row, where the tile is moved to so as to lie within the array, end of the group, and number of the columns."""
            visit, j = jax.lax.div(item, jnp.int32(tiles)), jax.lax.rem(item, jnp.int32(tiles))
            row = row_gmem[visit]
            return group_gmem[visit], row, jnp.minimum(row, rows - TILE_ROWS), end_gmem[visit], j

        def steps_of(item):
            # Rows beyond the last group: no product, and zeros are stored.
            return jnp.where(place(item)[0] < groups, steps, 0)

        def bring(item, step, slot, here):
            group, _, first_row, _, j = place(item)
            at, own = pl.ds(step * BLOCK, BLOCK), pl.ds(first_row, TILE_ROWS)
            plgpu.copy_gmem_to_smem(x_gmem.at[own, at], x_smem.at[slot], here)
            plgpu.copy_gmem_to_smem(scale_gmem.at[step, own], scale_smem.at[slot], here)
            plgpu.copy_gmem_to_smem(w_gmem.at[group, pl.ds(j * BLOCK, BLOCK), at], w_smem.at[slot], here)

        def sum_of(item, steps_here, done):
            group, *_, j = place(item)
            group = jnp.minimum(group, groups - 1)

            def add(i, state):
                sums, w_scale = state
                slot = ring.slot(done + i)
                ring.await_here(done + i)
                next_w_scale = w_scale_gmem[group, j, jnp.minimum(i + 1, steps - 1)]  # arrives during the product
                part = multiply(x_smem.at[slot, own_rows], w_smem.at[slot].T)
                scale = plgpu.layout_cast(scale_smem[slot, own_rows], PER_ROW) * w_scale
                plgpu.commit_smem()  # what TMA overwrites has been read
                ring.release(done + i)
                return sums + part * across(scale, part.shape), next_w_scale

            sums = full((ROWS, BLOCK), 0.0, TILE)
            return jax.lax.fori_loop(0, steps_here, add, (sums, w_scale_gmem[group, j, 0]))[0]

        def store(item, sums):
            _, row, first_row, end, j = place(item)
            first_row += jax.lax.axis_index("warpgroup") * ROWS
            start, end = (jnp.clip(at - first_row, 0, ROWS) for at in (row, jnp.minimum(end, row + TILE_ROWS)))
            for part in range(BLOCK // PART):
                y = sums[:, part * PART : (part + 1) * PART].astype(dtype)
                target = y_gmem.at[:, pl.ds(j * BLOCK + part * PART, PART)]
                staging.store(y, target, first_row, start, end)

        take_turns(ring, count_gmem[0] * tiles, steps_of=steps_of, bring=bring, sum_of=sum_of, store=store)

    y_MF = kernel(
        fp8_grouped_gemm,
        out_type=jax.ShapeDtypeStruct((rows, columns), dtype),
        operands=[
            smem((STAGES, TILE_ROWS, BLOCK), x_MD.dtype),
            smem((STAGES, BLOCK, BLOCK), w_EFD.dtype),
            plgpu.SMEM((STAGES, TILE_ROWS), jnp.float32),
        ],
        copies=3,
        dtype=dtype,
        stages=STAGES,
    )(x_MD, w_EFD, scale_KM, w_scale, visits.group_V, visits.row_V, visits.end_V, visits.count)
    return y_MF[: shape[0], : shape[1]]
