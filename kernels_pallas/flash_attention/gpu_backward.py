"""Gradients of attention as two Mosaic GPU kernels (Hopper), one walking over keys for dq, one over queries for dk and dv.

Both compute the probabilities again, seven products in all, and more where two warpgroups share the sums of wide heads; nothing is
added atomically, so the same bits come out every time.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu_backward_tile import BackwardTile, choose_dk_dv, choose_dq
from kernels_pallas.flash_attention.hopper import (
    LOG2_E,
    PER_COLUMN,
    PER_ROW,
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    WARPGROUPS,
    across,
    add_products,
    check,
    compiler_params,
    down,
    meet,
    multiply,
    no_sums,
    not_before_the_loop,
    pad,
    pad_widths,
    put,
    smem,
    subtract_from_product,
    tanh,
)
from kernels_pallas.flash_attention.hopper_walk import Walk
from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.vary import vary_alike


def backward(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    mask: Mask,
    lse_BTN: jax.Array,
    dout_BTNU: jax.Array,
    delta_BTN: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from those of the logits, ds = p (dp - delta). Raises Unsupported."""
    check(q_BTNK, mask, scale)
    shapes = [a.shape for a in (q_BTNK, k_BSZK, v_BSZU)]
    rows = WARPGROUPS * ROWS
    q_BTNK, k_BSZK, v_BSZU, dout_BTNU = (pad(a, 1, rows) for a in pad_widths(q_BTNK, k_BSZK, v_BSZU, dout_BTNU))
    # Padded queries, and those that see nothing, have probabilities of exp2(-inf).
    lse_BTN = jnp.where(lse_BTN == -jnp.inf, jnp.inf, lse_BTN * LOG2_E)
    lse_BNT, delta_BNT = (pad(a.swapaxes(1, 2), 2, rows, value) for a, value in ((lse_BTN, jnp.inf), (delta_BTN, 0)))
    K, U = q_BTNK.shape[3], v_BSZU.shape[3]
    call = _Call(
        mask=mask,
        lengths=(shapes[0][1], shapes[1][1]),
        scale=scale,
        softcap=softcap,
        args=(q_BTNK, k_BSZK, v_BSZU, dout_BTNU, lse_BNT, delta_BNT),
    )
    grads = [call.dq(choose_dq(K, U))]
    for tile in choose_dk_dv(K, U):
        grads += call.dk_dv(tile)
    *grads, _ = vary_alike((*grads, q_BTNK))  # which kernels leave out of their results' types
    dq_BTNK, dk_BSZK, dv_BSZU = (a[:, : shape[1], :, : shape[3]] for a, shape in zip(grads, shapes, strict=True))
    return dq_BTNK, dk_BSZK, dv_BSZU


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """Padded arguments: q [B, T, N, K], k [B, S, Z, K], v [B, S, Z, U], dout, lse in base 2 and delta [B, N, T]."""

    mask: Mask
    lengths: tuple[int, int]  # of queries and keys before that
    scale: float
    softcap: float | None
    args: tuple[jax.Array, ...]

    @property
    def padded(self) -> tuple[int, int]:
        return self.args[0].shape[1], self.args[1].shape[1]

    @property
    def groups(self) -> int:
        return self.args[0].shape[2] // self.args[1].shape[2]

    def probabilities(self, s: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """p of products q k where keys are seen, and the slope of the softcap if there is one."""
        if self.softcap is None:
            return jnp.exp2(s * (self.scale * LOG2_E) - lse), None
        t = tanh(s * (self.scale / self.softcap))
        return jnp.exp2(t * (self.softcap * LOG2_E) - lse), 1 - t * t

    def dq(self, tile: BackwardTile) -> jax.Array:
        q_BTNK, _, v_BSZU = self.args[:3]
        batch, length, heads, K = q_BTNK.shape
        U, dtype = v_BSZU.shape[3], q_BTNK.dtype
        tile.check(K, U)
        blocks, swizzle = length // tile.own_rows, tile.swizzle(K, U)
        walk = Walk.along_queries(self.mask, self.lengths, self.padded, rows=tile.own_rows, columns=tile.rows)

        def flash_attention_dq(*refs):
            refs = list(refs)
            take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
            q_gmem, k_gmem, v_gmem, dout_gmem, lse_gmem, delta_gmem = take(6)
            walk_gmem = take(len(walk.arrays))
            (dq_gmem,) = take(1)
            own_here, k_here, v_here, free, all_free = take(5)
            q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem = take(6)
            q_ids_smem, kv_ids_smem = take(2) if walk.kinds else (None, None)
            b, n, w = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
            buffer = refs.pop().at[w] if refs else None
            block = blocks - 1 - jax.lax.axis_index("block")
            first_row = block * tile.own_rows
            tiles = walk.tiles(b, block, walk_gmem)
            start, *_, end = tiles

            @pl.when(w == WARPGROUPS)
            def _bring():
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
                z = jax.lax.div(n, jnp.int32(self.groups))
                for i in range(tile.blocks):
                    rows = pl.ds(first_row + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, n], q_smem.at[i], own_here.at[i])
                    plgpu.copy_gmem_to_smem(dout_gmem.at[b, rows, n], dout_smem.at[i], own_here.at[i])
                    plgpu.copy_gmem_to_smem(lse_gmem.at[b, n, rows], lse_smem.at[i], own_here.at[i])
                    plgpu.copy_gmem_to_smem(delta_gmem.at[b, n, rows], delta_smem.at[i], own_here.at[i])
                    if q_ids_smem is not None:
                        plgpu.copy_gmem_to_smem(walk_gmem[0].at[b, :, rows], q_ids_smem.at[i], own_here.at[i])

                def bring(step, _):
                    slot, keys = jax.lax.rem(step - start, jnp.int32(tile.stages)), pl.ds(step * tile.rows, tile.rows)
                    pl.when(step - start >= tile.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_gmem.at[b, keys, z], k_smem.at[slot], k_here.at[slot])
                    if kv_ids_smem is not None:
                        plgpu.copy_gmem_to_smem(walk_gmem[1].at[b, :, keys], kv_ids_smem.at[slot], k_here.at[slot])
                    plgpu.copy_gmem_to_smem(v_gmem.at[b, keys, z], v_smem.at[slot], v_here.at[slot])
                    return ()

                jax.lax.fori_loop(start, end, bring, ())

            @tile.of_warpgroups
            def _compute(mine, written, columns):
                plgpu.set_max_registers(REGISTERS, action="increase")
                row = first_row + mine * ROWS
                plgpu.barrier_wait(own_here.at[mine])

                def absorb(step, sums):
                    slot, own = not_before_the_loop(jax.lax.rem(step - start, jnp.int32(tile.stages)), mine)
                    plgpu.barrier_wait(k_here.at[slot])
                    s = multiply(q_smem.at[own], k_smem.at[slot].T)
                    # Registers are short: numbers of rows wait in their buffers.
                    p, slope = self.probabilities(s, across(plgpu.layout_cast(lse_smem[own], PER_ROW), s.shape))
                    ids = (
                        (None, None)
                        if q_ids_smem is None or kv_ids_smem is None
                        else (q_ids_smem.at[own], kv_ids_smem.at[slot])
                    )
                    p = walk.hide(p, row, step, tiles, 0.0, *ids)
                    p = p if slope is None else p * slope
                    plgpu.barrier_wait(v_here.at[slot])
                    delta = across(plgpu.layout_cast(delta_smem[own], PER_ROW), p.shape)
                    ds = p * subtract_from_product(dout_smem.at[own], v_smem.at[slot].T, delta, buffer is None)
                    sums = add_products(sums, ds.astype(dtype), k_smem.at[slot], columns, buffer)
                    if walk.kinds:
                        plgpu.commit_smem()  # what TMA overwrites has been read
                    plgpu.barrier_arrive(free.at[slot])
                    return sums

                sums = jax.lax.fori_loop(start, end, absorb, no_sums(columns))
                meet(all_free)  # the gradient leaves by way of the place of what it is of
                put(q_smem.at[mine], sums, columns, self.scale)
                plgpu.commit_smem()
                meet(all_free)
                rows = pl.ds(row + written.start, written.stop - written.start)
                plgpu.copy_smem_to_gmem(q_smem.at[mine, written], dq_gmem.at[b, rows, n])
                plgpu.wait_smem_to_gmem(0)

        q_ids = plgpu.SMEM((tile.blocks, walk.kinds, ROWS), jnp.int32)
        kv_ids = plgpu.SMEM((tile.stages, walk.kinds, tile.rows), jnp.int32)
        has_ids = walk.kinds > 0
        return plgpu.kernel(
            flash_attention_dq,
            out_type=jax.ShapeDtypeStruct(q_BTNK.shape, dtype),
            scratch_types=[
                plgpu.Barrier(num_barriers=tile.blocks, num_arrivals=4 + has_ids),
                plgpu.Barrier(num_barriers=tile.stages, num_arrivals=1 + has_ids),
                plgpu.Barrier(num_barriers=tile.stages),
                plgpu.Barrier(num_barriers=tile.stages, num_arrivals=WARPGROUPS),
                plgpu.Barrier(num_arrivals=WARPGROUPS),
                smem((tile.blocks, ROWS, K), dtype, swizzle),
                smem((tile.blocks, ROWS, U), dtype, swizzle),
                smem((tile.stages, tile.rows, K), dtype, swizzle),
                smem((tile.stages, tile.rows, U), dtype, swizzle),
                *[plgpu.SMEM((tile.blocks, ROWS), jnp.float32)] * 2,
                *((q_ids, kv_ids) if has_ids else ()),
                *[smem((WARPGROUPS, ROWS, tile.rows), dtype, swizzle)] * tile.in_shared_memory,
            ],
            grid=(batch, heads, blocks),
            grid_names=("batch", "head", "block"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=compiler_params(),
        )(*self.args, *walk.arrays)

    def dk_dv(self, tile: BackwardTile) -> list[jax.Array]:
        """Those of the two of which the tile has sums."""
        q_BTNK, k_BSZK, v_BSZU = self.args[:3]
        batch, length, kv_heads, K = k_BSZK.shape
        U, dtype = v_BSZU.shape[3], q_BTNK.dtype
        tile.check(K, U)
        swizzle = tile.swizzle(K, U)
        walk = Walk.along_keys(self.mask, self.lengths, self.padded, rows=tile.own_rows, columns=tile.rows)
        wanted = [any(sums[i] for sums in tile.sums) for i in range(2)]
        grads = [jax.ShapeDtypeStruct(a.shape, dtype) for a, want in zip((k_BSZK, v_BSZU), wanted, strict=True) if want]

        def flash_attention_dk_dv(*refs):
            refs = list(refs)
            take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
            q_gmem, k_gmem, v_gmem, dout_gmem, lse_gmem, delta_gmem = take(6)
            walk_gmem = take(len(walk.arrays))
            grads_gmem = [take(1)[0] if want else None for want in wanted]
            own_here, q_here, dout_here, free, all_free = take(5)
            k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem = take(6)
            kv_ids_smem, q_ids_smem = take(2) if walk.kinds else (None, None)
            b, z, w = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
            buffer = refs.pop().at[w] if refs else None
            block = jax.lax.axis_index("block")  # if causal, the first keys have most queries
            first_key = block * tile.own_rows
            tiles = walk.tiles(b, block, walk_gmem)
            start, *_, end = tiles

            def number(g, step):
                return g * (end - start) + step - start

            @pl.when(w == WARPGROUPS)
            def _bring():
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
                for i in range(tile.blocks):
                    keys = pl.ds(first_key + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(k_gmem.at[b, keys, z], k_smem.at[i], own_here)
                    plgpu.copy_gmem_to_smem(v_gmem.at[b, keys, z], v_smem.at[i], own_here)
                    if kv_ids_smem is not None:
                        plgpu.copy_gmem_to_smem(walk_gmem[0].at[b, :, keys], kv_ids_smem.at[i], own_here)

                def bring_head(g, _):
                    def bring(step, _):
                        count, rows, n = number(g, step), pl.ds(step * tile.rows, tile.rows), z * self.groups + g
                        slot = jax.lax.rem(count, jnp.int32(tile.stages))
                        pl.when(count >= tile.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                        plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, n], q_smem.at[slot], q_here.at[slot])
                        plgpu.copy_gmem_to_smem(lse_gmem.at[b, n, rows], lse_smem.at[slot], q_here.at[slot])
                        plgpu.copy_gmem_to_smem(delta_gmem.at[b, n, rows], delta_smem.at[slot], q_here.at[slot])
                        if q_ids_smem is not None:
                            plgpu.copy_gmem_to_smem(walk_gmem[1].at[b, :, rows], q_ids_smem.at[slot], q_here.at[slot])
                        plgpu.copy_gmem_to_smem(dout_gmem.at[b, rows, n], dout_smem.at[slot], dout_here.at[slot])
                        return ()

                    return jax.lax.fori_loop(start, end, bring, ())

                jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.groups), bring_head, ())

            @tile.of_warpgroups
            def _compute(mine, written, dk_columns, dv_columns):
                plgpu.set_max_registers(REGISTERS, action="increase")
                key = first_key + mine * ROWS
                plgpu.barrier_wait(own_here)

                def absorb(step, sums, g):
                    dk, dv = sums
                    slot, own = not_before_the_loop(jax.lax.rem(number(g, step), jnp.int32(tile.stages)), mine)
                    plgpu.barrier_wait(q_here.at[slot])
                    s = multiply(k_smem.at[own], q_smem.at[slot].T)
                    p, slope = self.probabilities(s, down(plgpu.layout_cast(lse_smem[slot], PER_COLUMN), s.shape))
                    ids = (
                        (None, None)
                        if q_ids_smem is None or kv_ids_smem is None
                        else (kv_ids_smem.at[own], q_ids_smem.at[slot])
                    )
                    p = walk.hide(p, key, step, tiles, 0.0, *ids)
                    plgpu.barrier_wait(dout_here.at[slot])
                    dv = add_products(dv, p.astype(dtype), dout_smem.at[slot], dv_columns, buffer)
                    if dk_columns:
                        p = p if slope is None else p * slope
                        delta = down(plgpu.layout_cast(delta_smem[slot], PER_COLUMN), p.shape)
                        ds = p * subtract_from_product(v_smem.at[own], dout_smem.at[slot].T, delta, buffer is None)
                        dk = add_products(dk, ds.astype(dtype), q_smem.at[slot], dk_columns, buffer)
                    plgpu.commit_smem()  # what TMA overwrites has been read
                    plgpu.barrier_arrive(free.at[slot])
                    return dk, dv

                def absorb_head(g, sums):
                    return jax.lax.fori_loop(start, end, functools.partial(absorb, g=g), sums)

                sums = no_sums(dk_columns), no_sums(dv_columns)
                dk, dv = jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.groups), absorb_head, sums)
                meet(all_free)  # each gradient leaves by way of the place of what it is of
                put(k_smem.at[mine], dk, dk_columns, self.scale)
                put(v_smem.at[mine], dv, dv_columns, 1.0)
                plgpu.commit_smem()
                meet(all_free)
                keys = pl.ds(key + written.start, written.stop - written.start)
                for place, grad_gmem in zip((k_smem, v_smem), grads_gmem, strict=True):
                    if grad_gmem is not None:
                        plgpu.copy_smem_to_gmem(place.at[mine, written], grad_gmem.at[b, keys, z])
                plgpu.wait_smem_to_gmem(0)

        kv_ids = plgpu.SMEM((tile.blocks, walk.kinds, ROWS), jnp.int32)
        q_ids = plgpu.SMEM((tile.stages, walk.kinds, tile.rows), jnp.int32)
        has_ids = walk.kinds > 0
        return plgpu.kernel(
            flash_attention_dk_dv,
            out_type=grads,
            scratch_types=[
                plgpu.Barrier(num_arrivals=(2 + has_ids) * tile.blocks),
                plgpu.Barrier(num_barriers=tile.stages, num_arrivals=3 + has_ids),
                plgpu.Barrier(num_barriers=tile.stages),
                plgpu.Barrier(num_barriers=tile.stages, num_arrivals=WARPGROUPS),
                plgpu.Barrier(num_arrivals=WARPGROUPS),
                smem((tile.blocks, ROWS, K), dtype, swizzle),
                smem((tile.blocks, ROWS, U), dtype, swizzle),
                smem((tile.stages, tile.rows, K), dtype, swizzle),
                smem((tile.stages, tile.rows, U), dtype, swizzle),
                *[plgpu.SMEM((tile.stages, tile.rows), jnp.float32)] * 2,
                *((kv_ids, q_ids) if has_ids else ()),
                *[smem((WARPGROUPS, ROWS, tile.rows), dtype, swizzle)] * tile.in_shared_memory,
            ],
            grid=(batch, kv_heads, length // tile.own_rows),
            grid_names=("batch", "head", "block"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=compiler_params(),
        )(*self.args, *walk.arrays)
