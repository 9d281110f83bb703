"""Attention as a Mosaic GPU kernel (Hopper), after FlashAttention-3 (arXiv 2407.08608).

A block of threads takes 128 queries of one head: one warpgroup brings keys and values by TMA, two compute, each 64 queries; or the
same 64, and each half of wide values, where the probabilities are computed twice.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu_backward import backward as backward
from kernels_pallas.flash_attention.hopper import (
    LOG2_E,
    PER_ROW,
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    SHARED_MEMORY,
    TILE,
    WARPGROUPS,
    WIDEST_PRODUCT,
    across,
    add_product,
    check,
    compiler_params,
    full,
    meet,
    multiply,
    pad,
    pad_widths,
    smem,
    swizzle_of,
    tanh,
)
from kernels_pallas.flash_attention.hopper_walk import Walk
from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.select import Unsupported
from kernels_pallas.vary import vary_alike

LEAST = -1e30  # stands for -inf where a difference of two must be a number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Keys and values at a time, and how many such steps are on their way or in use."""

    keys: int
    stages: int
    qk_width: int
    v_width: int
    # Both warpgroups take the same queries, and each half of the values' width: where one has no registers for all.
    split: bool = False
    in_shared_memory: bool = False  # probabilities on their way, sums apart: slower, but JAX can interpret it

    def __post_init__(self):
        if self.keys % ROWS or not ROWS <= self.keys <= 256 or self.stages < self.blocks:
            raise ValueError(f"{self}: keys must be 64, 128, 192 or 256, and stages at least {self.blocks}")
        if self.part % self.swizzle or self.part > WIDEST_PRODUCT:
            raise ValueError(f"{self}: a warpgroup cannot sum {self.part} columns of values")
        if self.registers > REGISTERS:
            raise ValueError(f"{self} needs {self.registers} registers a thread and would spill; make keys fewer")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self} needs {self.shared_memory} bytes of shared memory; a block has {SHARED_MEMORY}")

    @property
    def blocks(self) -> int:
        """Of ROWS queries."""
        return 1 if self.split else WARPGROUPS

    @property
    def parts(self) -> int:
        """Of the values' width."""
        return WARPGROUPS if self.split else 1

    @property
    def part(self) -> int:
        return self.v_width // self.parts

    @property
    def swizzle(self) -> int:
        return swizzle_of(self.qk_width, self.part)

    @property
    def registers(self) -> int:
        """Sums, logits, probabilities in 16 bits, and about 40 for everything else."""
        return self.part // 2 + self.keys // 2 + self.keys // 4 + 40

    @property
    def shared_memory(self) -> int:
        queries = self.blocks * ROWS * self.qk_width
        probabilities = self.in_shared_memory * WARPGROUPS * ROWS * self.keys
        steps = self.stages * self.keys * (self.qk_width + self.v_width)
        ids = 8 * (self.blocks * ROWS + self.stages * self.keys)
        return 2 * (queries + probabilities + steps) + ids + 2 * 1024  # logsumexp and barriers


def choose(K: int, U: int) -> Tile:
    """Many keys rather than many stages; both warpgroups for the same queries only if there is no other way."""
    for split in (False, True):
        for keys, stages in ((128, 3), (128, 2), (64, 3), (64, 2), (64, 1)):
            try:
                return Tile(keys=keys, stages=stages, qk_width=K, v_width=U, split=split)
            except ValueError:
                continue
    raise Unsupported(f"flash_attention on gpu has no tile for widths {K} and {U}; 'xla' takes every width")


def forward(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    sinks_N: jax.Array | None,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, U] in q's dtype and the logsumexp [B, T, N]. Raises Unsupported."""
    check(q_BTNK, mask, scale)
    batch, num_queries, heads, _ = q_BTNK.shape
    groups, num_keys, v_width, dtype = heads // k_BSZK.shape[2], k_BSZK.shape[1], v_BSZU.shape[3], q_BTNK.dtype
    q_BTNK, k_BSZK, v_BSZU = pad_widths(q_BTNK, k_BSZK, v_BSZU)
    K, U = q_BTNK.shape[3], v_BSZU.shape[3]
    tile = choose(K, U)
    own_rows = tile.blocks * ROWS
    q_BTNK = pad(q_BTNK, 1, own_rows)
    k_BSZK, v_BSZU = (pad(a, 1, tile.keys) for a in (k_BSZK, v_BSZU))
    padded = q_BTNK.shape[1], k_BSZK.shape[1]
    walk = Walk.along_queries(mask, (num_queries, num_keys), padded, rows=own_rows, columns=tile.keys)
    blocks = padded[0] // own_rows
    sinks = () if sinks_N is None else (sinks_N.astype(jnp.float32),)
    # exp(x) is exp2(x log2(e)), and the factor joins another.
    to_log2 = (scale if softcap is None else softcap) * LOG2_E

    def flash_attention_forward(*refs):
        refs = list(refs)
        take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
        q_gmem, k_gmem, v_gmem = take(3)
        walk_gmem, sinks_gmem = take(len(walk.arrays)), take(len(sinks))
        out_gmem, lse_gmem = take(2)
        q_here, k_here, v_here, k_free, v_free, all_free = take(6)
        q_smem, k_smem, v_smem, lse_smem = take(4)
        q_ids_smem, kv_ids_smem = take(2) if walk.kinds else (None, None)
        (p_smem,) = take(1) if tile.in_shared_memory else (None,)
        b, n, w = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        # The last queries first: if causal they see most keys, and blocks that see few fill the gaps at the end.
        block = blocks - 1 - jax.lax.axis_index("block")
        tiles = walk.tiles(b, block, walk_gmem)
        start, *_, end = tiles

        def slot_of(step):
            return jax.lax.rem(step - start, jnp.int32(tile.stages))

        @pl.when(w == WARPGROUPS)
        def _bring():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            z = jax.lax.div(n, jnp.int32(groups))
            for i in range(tile.blocks):
                rows = pl.ds(block * own_rows + i * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, n], q_smem.at[i], q_here.at[i])
                if q_ids_smem is not None:
                    plgpu.copy_gmem_to_smem(walk_gmem[0].at[b, :, rows], q_ids_smem.at[i], q_here.at[i])

            def bring(step, _):
                slot, keys, again = slot_of(step), pl.ds(step * tile.keys, tile.keys), step - start >= tile.stages
                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_gmem.at[b, keys, z], k_smem.at[slot], k_here.at[slot])
                if kv_ids_smem is not None:
                    plgpu.copy_gmem_to_smem(walk_gmem[1].at[b, :, keys], kv_ids_smem.at[slot], k_here.at[slot])
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                for part in range(tile.parts):
                    columns = pl.ds(part * tile.part, tile.part)
                    plgpu.copy_gmem_to_smem(v_gmem.at[b, keys, z, columns], v_smem.at[slot, part], v_here.at[slot])
                return ()

            jax.lax.fori_loop(start, end, bring, ())

        @pl.when(w < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(REGISTERS, action="increase")
            mine, part = (0, w) if tile.split else (w, 0)
            row = block * own_rows + mine * ROWS
            plgpu.barrier_wait(q_here.at[mine])

            def absorb(step, state):
                o, m, l = state
                slot = slot_of(step)
                plgpu.barrier_wait(k_here.at[slot])
                s = multiply(q_smem.at[mine], k_smem.at[slot].T)
                if softcap is not None:
                    s = tanh(s * (scale / softcap))
                if q_ids_smem is None or kv_ids_smem is None:
                    plgpu.barrier_arrive(k_free.at[slot])
                    s = walk.hide(s, row, step, tiles, -jnp.inf, None, None)
                else:
                    s = walk.hide(s, row, step, tiles, -jnp.inf, q_ids_smem.at[mine], kv_ids_smem.at[slot])
                    plgpu.commit_smem()  # what TMA overwrites has been read
                    plgpu.barrier_arrive(k_free.at[slot])
                new_m = jnp.maximum(m, jnp.max(s, axis=1) * to_log2)
                kept = jnp.exp2(m - new_m)
                p = jnp.exp2(s * to_log2 - across(new_m, s.shape))
                l = l * kept + jnp.sum(p, axis=1)
                o = o * across(kept, o.shape)
                plgpu.barrier_wait(v_here.at[slot])
                o = add_product(o, p.astype(dtype), v_smem.at[slot, part], None if p_smem is None else p_smem.at[w])
                plgpu.barrier_arrive(v_free.at[slot])
                return o, new_m, l

            m, l = full((ROWS,), LEAST, PER_ROW), full((ROWS,), 0.0, PER_ROW)
            if sinks_gmem:
                sink = full((ROWS,), sinks_gmem[0][n] * LOG2_E, PER_ROW)
                m = jnp.maximum(m, sink)
                l = jnp.exp2(sink - m)
            state = full((ROWS, tile.part), 0.0, TILE), m, l
            o, m, l = jax.lax.fori_loop(start, end, absorb, state)
            none = l == 0
            l = jnp.where(none, 1.0, l)
            meet(all_free)  # the output leaves by way of the values' place
            rows, columns = pl.ds(row, ROWS), pl.ds(part * tile.part, tile.part)
            out_smem = v_smem.at[mine, part, pl.ds(0, ROWS)]
            out_smem[...] = (o * across(1 / l, o.shape)).astype(dtype)
            lse_smem[w] = jnp.where(none, -jnp.inf, m * (1 / LOG2_E) + jnp.log(l))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[b, rows, n, columns])
            pl.when(w < tile.blocks)(lambda: plgpu.copy_smem_to_gmem(lse_smem.at[w], lse_gmem.at[b, n, rows]))
            plgpu.wait_smem_to_gmem(0)

    q_ids = plgpu.SMEM((tile.blocks, walk.kinds, ROWS), jnp.int32)
    kv_ids = plgpu.SMEM((tile.stages, walk.kinds, tile.keys), jnp.int32)
    copies = 2 if walk.kinds else 1
    out_BTNU, lse_BNT = plgpu.kernel(
        flash_attention_forward,
        out_type=(
            jax.ShapeDtypeStruct((*q_BTNK.shape[:3], U), dtype),
            jax.ShapeDtypeStruct((batch, heads, q_BTNK.shape[1]), jnp.float32),
        ),
        scratch_types=[
            plgpu.Barrier(num_barriers=tile.blocks, num_arrivals=copies),
            plgpu.Barrier(num_barriers=tile.stages, num_arrivals=copies),
            plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.parts),
            plgpu.Barrier(num_barriers=tile.stages, num_arrivals=WARPGROUPS),
            plgpu.Barrier(num_barriers=tile.stages, num_arrivals=WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            smem((tile.blocks, ROWS, K), dtype, tile.swizzle),
            smem((tile.stages, tile.keys, K), dtype, tile.swizzle),
            smem((tile.stages, tile.parts, tile.keys, tile.part), dtype, tile.swizzle),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            *((q_ids, kv_ids) if walk.kinds else ()),
            *([smem((WARPGROUPS, ROWS, tile.keys), dtype, tile.swizzle)] if tile.in_shared_memory else []),
        ],
        grid=(batch, heads, blocks),
        grid_names=("batch", "head", "block"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
    )(q_BTNK, k_BSZK, v_BSZU, *walk.arrays, *sinks)
    out_BTNU, lse_BNT, _ = vary_alike((out_BTNU, lse_BNT, q_BTNK))  # which kernels leave out of their results' types
    return out_BTNU[:, :num_queries, :, :v_width], lse_BNT.swapaxes(1, 2)[:, :num_queries]
