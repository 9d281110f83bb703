"""Gradients of attention as two Mosaic GPU kernels (Hopper), one walking over keys for dq, one over queries for dk and dv.

Both compute the probabilities again, seven products in all; nothing is added atomically, so the same bits come out every time.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.hopper import (
    LOG2_E,
    PER_COLUMN,
    PER_ROW,
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    SHARED_MEMORY,
    TILE,
    WARPGROUPS,
    WIDTH,
    Band,
    across,
    add_product,
    check,
    compiler_params,
    down,
    full,
    hide_other_segments,
    multiply,
    pad,
    segment_ids,
    smem,
    subtract_from_product,
    tanh,
)
from kernels_pallas.flash_attention.mask import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardTile:
    """Rows of the other side at a time, and how many such steps are on their way or in use."""

    rows: int = 64
    stages: int = 2
    split: bool = False  # one warpgroup sums dk and one dv for the same keys: where one has no registers for both
    in_shared_memory: bool = False  # see gpu.Tile

    def __post_init__(self):
        if self.rows not in (64, 128) or self.stages < 1:
            raise ValueError(f"{self}: rows must be 64 or 128, and stages at least 1")

    @property
    def own_rows(self) -> int:
        """Of a block of threads."""
        return ROWS if self.split else WARPGROUPS * ROWS

    def check(self, K: int, U: int) -> None:
        """ValueError if it does not fit queries and keys of width K and values of width U."""
        scratch = self.in_shared_memory * WARPGROUPS * ROWS * self.rows
        bytes_ = (self.own_rows + self.stages * self.rows) * (2 * (K + U) + 12) + 2 * scratch + 5 * 1024
        if bytes_ > SHARED_MEMORY:
            raise ValueError(f"{self} needs {bytes_} bytes of shared memory; a block has {SHARED_MEMORY}")


def choose_dq(K: int, U: int) -> BackwardTile:
    return BackwardTile(stages=2 if K + U <= 320 else 1)


def choose_dk_dv(K: int, U: int, extras: bool) -> BackwardTile:
    """extras: a softcap or segments, which take registers too."""
    return BackwardTile(split=K + U + 64 * extras > 256)


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
    check(q_BTNK, v_BSZU, mask, scale)
    shapes = [a.shape for a in (q_BTNK, k_BSZK, v_BSZU)]
    band = Band.of(mask, q_BTNK.shape[1], k_BSZK.shape[1])
    rows = WARPGROUPS * ROWS
    q_BTNK, k_BSZK, v_BSZU, dout_BTNU = (pad(pad(a, 3, WIDTH), 1, rows) for a in (q_BTNK, k_BSZK, v_BSZU, dout_BTNU))
    # Padded queries, and those that see nothing, have probabilities of exp2(-inf).
    lse_BTN = jnp.where(lse_BTN == -jnp.inf, jnp.inf, lse_BTN * LOG2_E)
    lse_BNT, delta_BNT = (pad(a.swapaxes(1, 2), 2, rows, value) for a, value in ((lse_BTN, jnp.inf), (delta_BTN, 0)))
    K, U = q_BTNK.shape[3], v_BSZU.shape[3]
    call = _Call(
        band=band,
        scale=scale,
        softcap=softcap,
        groups=q_BTNK.shape[2] // k_BSZK.shape[2],
        args=(q_BTNK, k_BSZK, v_BSZU, dout_BTNU, lse_BNT, delta_BNT, *segment_ids(mask, rows, rows)),
    )
    grads = call.dq(choose_dq(K, U)), *call.dk_dv(choose_dk_dv(K, U, softcap is not None or call.segmented))
    dq_BTNK, dk_BSZK, dv_BSZU = (a[:, : shape[1], :, : shape[3]] for a, shape in zip(grads, shapes, strict=True))
    return dq_BTNK, dk_BSZK, dv_BSZU


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """Padded arguments: q [B, T, N, K], k [B, S, Z, K], v [B, S, Z, U], dout, lse in base 2 and delta [B, N, T], perhaps ids."""

    band: Band
    scale: float
    softcap: float | None
    groups: int
    args: tuple[jax.Array, ...]

    @property
    def segmented(self) -> bool:
        return len(self.args) > 6

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
        blocks = length // tile.own_rows

        def flash_attention_dq(*refs):
            refs = list(refs)
            take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
            q_gmem, k_gmem, v_gmem, dout_gmem, lse_gmem, delta_gmem = take(6)
            ids_gmem = take(2 if self.segmented else 0)
            (dq_gmem,) = take(1)
            own_here, k_here, v_here, free = take(4)
            q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem = take(6)
            q_ids_smem, kv_ids_smem = take(2) if self.segmented else (None, None)
            b, n, w = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
            buffer = refs.pop().at[w] if refs else None
            first_row = (blocks - 1 - jax.lax.axis_index("block")) * tile.own_rows
            tiles = self.band.key_tiles(first_row, tile.own_rows, tile.rows)
            start, *_, end = tiles

            @pl.when(w == WARPGROUPS)
            def _bring():
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
                z = jax.lax.div(n, jnp.int32(self.groups))

                def bring(step, _):
                    slot, keys = jax.lax.rem(step - start, jnp.int32(tile.stages)), pl.ds(step * tile.rows, tile.rows)
                    pl.when(step - start >= tile.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_gmem.at[b, keys, z], k_smem.at[slot], k_here.at[slot])
                    if kv_ids_smem is not None:
                        plgpu.copy_gmem_to_smem(ids_gmem[1].at[b, keys], kv_ids_smem.at[slot], k_here.at[slot])
                    plgpu.copy_gmem_to_smem(v_gmem.at[b, keys, z], v_smem.at[slot], v_here.at[slot])
                    return ()

                jax.lax.fori_loop(start, end, bring, ())

            @pl.when(w < WARPGROUPS)
            def _compute():
                plgpu.set_max_registers(REGISTERS, action="increase")
                row = first_row + w * ROWS
                rows = pl.ds(row, ROWS)
                plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, n], q_smem.at[w], own_here.at[w])
                plgpu.copy_gmem_to_smem(dout_gmem.at[b, rows, n], dout_smem.at[w], own_here.at[w])
                plgpu.copy_gmem_to_smem(lse_gmem.at[b, n, rows], lse_smem.at[w], own_here.at[w])
                plgpu.copy_gmem_to_smem(delta_gmem.at[b, n, rows], delta_smem.at[w], own_here.at[w])
                if q_ids_smem is not None:
                    plgpu.copy_gmem_to_smem(ids_gmem[0].at[b, rows], q_ids_smem.at[w], own_here.at[w])
                plgpu.barrier_wait(own_here.at[w])
                q_ids = None if q_ids_smem is None else plgpu.layout_cast(q_ids_smem[w], PER_ROW)

                def absorb(step, dq):
                    slot = jax.lax.rem(step - start, jnp.int32(tile.stages))
                    plgpu.barrier_wait(k_here.at[slot])
                    s = multiply(q_smem.at[w], k_smem.at[slot].T)
                    # Registers are short: numbers of rows wait in their buffers.
                    p, slope = self.probabilities(s, across(plgpu.layout_cast(lse_smem[w], PER_ROW), s.shape))
                    p = self.band.hide(p, row, step, tiles, 0.0)
                    if q_ids is not None and kv_ids_smem is not None:
                        p = hide_other_segments(p, q_ids, kv_ids_smem.at[slot], 0.0)
                    plgpu.barrier_wait(v_here.at[slot])
                    delta = across(plgpu.layout_cast(delta_smem[w], PER_ROW), p.shape)
                    ds = p * subtract_from_product(dout_smem.at[w], v_smem.at[slot].T, delta, buffer is None)
                    ds = ds if slope is None else ds * slope
                    dq = add_product(dq, ds.astype(dtype), k_smem.at[slot], buffer)
                    if self.segmented:
                        plgpu.commit_smem()  # what TMA overwrites has been read
                    plgpu.barrier_arrive(free.at[slot])
                    return dq

                dq = jax.lax.fori_loop(start, end, absorb, full((ROWS, K), 0.0, TILE))
                q_smem[w] = (dq * self.scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem.at[w], dq_gmem.at[b, rows, n])
                plgpu.wait_smem_to_gmem(0)

        ids = (plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32), plgpu.SMEM((tile.stages, tile.rows), jnp.int32))
        return plgpu.kernel(
            flash_attention_dq,
            out_type=jax.ShapeDtypeStruct(q_BTNK.shape, dtype),
            scratch_types=[
                plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=4 + self.segmented),
                plgpu.Barrier(num_barriers=tile.stages, num_arrivals=1 + self.segmented),
                plgpu.Barrier(num_barriers=tile.stages),
                plgpu.Barrier(num_barriers=tile.stages, num_arrivals=WARPGROUPS),
                smem((WARPGROUPS, ROWS, K), dtype),
                smem((WARPGROUPS, ROWS, U), dtype),
                smem((tile.stages, tile.rows, K), dtype),
                smem((tile.stages, tile.rows, U), dtype),
                *[plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)] * 2,
                *(ids if self.segmented else ()),
                *[smem((WARPGROUPS, ROWS, tile.rows), dtype)] * tile.in_shared_memory,
            ],
            grid=(batch, heads, blocks),
            grid_names=("batch", "head", "block"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=compiler_params(),
        )(*self.args)

    def dk_dv(self, tile: BackwardTile) -> tuple[jax.Array, jax.Array]:
        q_BTNK, k_BSZK, v_BSZU = self.args[:3]
        batch, length, kv_heads, K = k_BSZK.shape
        U, dtype = v_BSZU.shape[3], q_BTNK.dtype
        tile.check(K, U)
        band = dataclasses.replace(self.band.transposed, num_keys=q_BTNK.shape[1])  # padded queries add nothing
        own = tile.own_rows // ROWS  # tiles of keys

        def flash_attention_dk_dv(*refs):
            refs = list(refs)
            take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
            q_gmem, k_gmem, v_gmem, dout_gmem, lse_gmem, delta_gmem = take(6)
            ids_gmem = take(2 if self.segmented else 0)
            dk_gmem, dv_gmem = take(2)
            own_here, q_here, dout_here, free, all_free = take(5)
            k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem = take(6)
            kv_ids_smem, q_ids_smem = take(2) if self.segmented else (None, None)
            b, z, w = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
            buffer = refs.pop().at[w] if refs else None
            first_key = jax.lax.axis_index("block") * tile.own_rows  # if causal, the first keys have most queries
            tiles = band.key_tiles(first_key, tile.own_rows, tile.rows)
            start, *_, end = tiles

            def number(g, step):
                return g * (end - start) + step - start

            @pl.when(w == WARPGROUPS)
            def _bring():
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
                keys = pl.ds(first_key, tile.own_rows)
                for i in range(own):
                    keys = pl.ds(first_key + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(k_gmem.at[b, keys, z], k_smem.at[i], own_here)
                    plgpu.copy_gmem_to_smem(v_gmem.at[b, keys, z], v_smem.at[i], own_here)
                    if kv_ids_smem is not None:
                        plgpu.copy_gmem_to_smem(ids_gmem[1].at[b, keys], kv_ids_smem.at[i], own_here)

                def bring_head(g, _):
                    def bring(step, _):
                        count, rows, n = number(g, step), pl.ds(step * tile.rows, tile.rows), z * self.groups + g
                        slot = jax.lax.rem(count, jnp.int32(tile.stages))
                        pl.when(count >= tile.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                        plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, n], q_smem.at[slot], q_here.at[slot])
                        plgpu.copy_gmem_to_smem(lse_gmem.at[b, n, rows], lse_smem.at[slot], q_here.at[slot])
                        plgpu.copy_gmem_to_smem(delta_gmem.at[b, n, rows], delta_smem.at[slot], q_here.at[slot])
                        if q_ids_smem is not None:
                            plgpu.copy_gmem_to_smem(ids_gmem[0].at[b, rows], q_ids_smem.at[slot], q_here.at[slot])
                        plgpu.copy_gmem_to_smem(dout_gmem.at[b, rows, n], dout_smem.at[slot], dout_here.at[slot])
                        return ()

                    return jax.lax.fori_loop(start, end, bring, ())

                jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.groups), bring_head, ())

            def compute(mine, want_dk, want_dv):
                plgpu.set_max_registers(REGISTERS, action="increase")
                key = first_key + mine * ROWS
                plgpu.barrier_wait(own_here)
                kv_ids = None if kv_ids_smem is None else plgpu.layout_cast(kv_ids_smem[mine], PER_ROW)

                def absorb(step, sums, g):
                    sums = list(sums)
                    slot = jax.lax.rem(number(g, step), jnp.int32(tile.stages))
                    plgpu.barrier_wait(q_here.at[slot])
                    s = multiply(k_smem.at[mine], q_smem.at[slot].T)
                    p, slope = self.probabilities(s, down(plgpu.layout_cast(lse_smem[slot], PER_COLUMN), s.shape))
                    p = band.hide(p, key, step, tiles, 0.0)
                    if kv_ids is not None and q_ids_smem is not None:
                        p = hide_other_segments(p, kv_ids, q_ids_smem.at[slot], 0.0)
                    plgpu.barrier_wait(dout_here.at[slot])
                    if want_dv:
                        sums[-1] = add_product(sums[-1], p.astype(dtype), dout_smem.at[slot], buffer)
                    if want_dk:
                        delta = down(plgpu.layout_cast(delta_smem[slot], PER_COLUMN), p.shape)
                        ds = p * subtract_from_product(v_smem.at[mine], dout_smem.at[slot].T, delta, buffer is None)
                        ds = ds if slope is None else ds * slope
                        sums[0] = add_product(sums[0], ds.astype(dtype), q_smem.at[slot], buffer)
                    plgpu.commit_smem()  # what TMA overwrites has been read
                    plgpu.barrier_arrive(free.at[slot])
                    return tuple(sums)

                def absorb_head(g, sums):
                    return jax.lax.fori_loop(start, end, functools.partial(absorb, g=g), sums)

                sums = tuple(full((ROWS, width), 0.0, TILE) for width in [K] * want_dk + [U] * want_dv)
                sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.groups), absorb_head, sums)
                plgpu.barrier_arrive(all_free)  # the gradients leave by way of the place of what they are of
                plgpu.barrier_wait(all_free)
                if want_dk:
                    k_smem[mine] = (sums[0] * self.scale).astype(dtype)
                if want_dv:
                    v_smem[mine] = sums[-1].astype(dtype)
                plgpu.commit_smem()
                keys = pl.ds(key, ROWS)
                if want_dk:
                    plgpu.copy_smem_to_gmem(k_smem.at[mine], dk_gmem.at[b, keys, z])
                if want_dv:
                    plgpu.copy_smem_to_gmem(v_smem.at[mine], dv_gmem.at[b, keys, z])
                plgpu.wait_smem_to_gmem(0)

            if tile.split:
                pl.when(w == 0)(lambda: compute(0, want_dk=True, want_dv=False))
                pl.when(w == 1)(lambda: compute(0, want_dk=False, want_dv=True))
            else:
                pl.when(w < WARPGROUPS)(lambda: compute(w, want_dk=True, want_dv=True))

        ids = (plgpu.SMEM((own, ROWS), jnp.int32), plgpu.SMEM((tile.stages, tile.rows), jnp.int32))
        return plgpu.kernel(
            flash_attention_dk_dv,
            out_type=(jax.ShapeDtypeStruct(k_BSZK.shape, dtype), jax.ShapeDtypeStruct(v_BSZU.shape, dtype)),
            scratch_types=[
                plgpu.Barrier(num_arrivals=(2 + self.segmented) * own),
                plgpu.Barrier(num_barriers=tile.stages, num_arrivals=3 + self.segmented),
                plgpu.Barrier(num_barriers=tile.stages),
                plgpu.Barrier(num_barriers=tile.stages, num_arrivals=WARPGROUPS),
                plgpu.Barrier(num_arrivals=WARPGROUPS),
                smem((own, ROWS, K), dtype),
                smem((own, ROWS, U), dtype),
                smem((tile.stages, tile.rows, K), dtype),
                smem((tile.stages, tile.rows, U), dtype),
                *[plgpu.SMEM((tile.stages, tile.rows), jnp.float32)] * 2,
                *(ids if self.segmented else ()),
                *[smem((WARPGROUPS, ROWS, tile.rows), dtype)] * tile.in_shared_memory,
            ],
            grid=(batch, kv_heads, length // tile.own_rows),
            grid_names=("batch", "head", "block"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=compiler_params(),
        )(*self.args)
