"""Decoding as a Mosaic GPU kernel (Hopper), after FlashMLA's division of labour: keys and values are read once.

A block of threads takes 64 rows, which are queries times heads of one request, and a part of the cache. One warpgroup brings
blocks of latents by TMA, two compute: both the same probabilities, each one half of the output's columns, as registers suffice
for no more.
"""

import dataclasses

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
    across,
    add_product,
    compiler_params,
    down,
    full,
    meet,
    pad,
    smem,
)
from kernels_pallas.mla_decode.cache import AnyCache, Fp8LatentCache, LatentCache, capacity
from kernels_pallas.mla_decode.combine import combine
from kernels_pallas.mla_decode.gpu_cache import SLOTS, WIDTH, Fp8Blocks, blocks_of
from kernels_pallas.select import Unsupported
from kernels_pallas.vary import vary_alike

NUM_SMS = 132  # of an H200
WIDEST = 512  # halves of the output in registers
START = 4  # what a thread block costs before and after its blocks of the cache, in such blocks; an estimate
LEAST = -1e30  # stands for -inf where a difference of two must be a number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How blocks of bfloat16 latents are walked over; FP8 ones are turned into bfloat16 one at a time."""

    latent: int
    rope: int
    stages: int  # blocks on their way or in use
    in_shared_memory: bool = False  # probabilities on their way, sums apart: slower, but JAX can interpret it

    def __post_init__(self):
        if self.stages < 1:
            raise ValueError(f"{self}: stages must be at least 1")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self} needs {self.shared_memory} bytes of shared memory; a block has {SHARED_MEMORY}")

    @property
    def shared_memory(self) -> int:
        rows = ROWS + self.stages * SLOTS
        probabilities = self.in_shared_memory * WARPGROUPS * ROWS * SLOTS
        return 2 * (rows * (self.latent + self.rope) + probabilities) + 2048  # barriers, and what is aligned


def choose(latent: int, rope: int) -> Tile:
    """As many stages as fit, up to four."""
    for stages in (4, 3):
        try:
            return Tile(latent=latent, rope=rope, stages=stages)
        except ValueError:
            continue
    return Tile(latent=latent, rope=rope, stages=2)


def decode(
    q_latent_BTNC: jax.Array,
    q_rope_BTNR: jax.Array,
    cache: AnyCache,
    lengths_B: jax.Array,
    scale: float,
    splits: int | None,
    *,
    num_sms: int = NUM_SMS,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNC, lse_BTN); out in float32 if joined from parts or read from FP8. Raises Unsupported."""
    B, T, N, C = q_latent_BTNC.shape
    R = q_rope_BTNR.shape[3]
    check(q_latent_BTNC, q_rope_BTNR, cache, scale)
    tile = choose(C, R)
    dtype, half = q_latent_BTNC.dtype, C // WARPGROUPS
    q_latent_BMC = pad(q_latent_BTNC.reshape(B, T * N, C), 1, ROWS)
    q_rope_BMR = pad(q_rope_BTNR.reshape(B, T * N, R), 1, ROWS)
    M = q_latent_BMC.shape[1]
    held = capacity(cache)
    page = cache.arrays[0].shape[1]
    splits = min(splits or choose_splits(B * M // ROWS, held // SLOTS, num_sms), held // SLOTS)
    table = () if cache.page_table_BP is None else (cache.page_table_BP.astype(jnp.int32),)
    kind = blocks_of(cache)
    # Beside what makes bfloat16 of bytes, registers do not suffice for the addresses of the 16 bits' way out.
    out_dtype = jnp.float32 if splits > 1 or kind is Fp8Blocks else dtype
    arrays, scratch = kind.arrays(cache), kind.scratch_types(C, R, tile.stages)  # pyright: ignore[reportArgumentType]
    to_log2 = scale * LOG2_E  # exp(x) is exp2(x log2(e)), and the factor joins another

    def mla_decode(*refs):
        refs = list(refs)
        take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
        lengths_gmem, q_latent_gmem, q_rope_gmem = take(3)
        arrays_gmem, table_gmem = take(len(arrays)), take(len(table))
        out_gmem, lse_gmem = take(2)
        q_here, q_read, q_latent_smem, q_rope_smem = take(4)
        blocks = kind(*arrays_gmem, *take(len(scratch)))
        b, part, m, w = (jax.lax.axis_index(name) for name in ("batch", "split", "rows", "warpgroup"))
        p_smem = refs.pop().at[w] if refs else None
        rows, columns = pl.ds(m * ROWS, ROWS), pl.ds(w * half, half)
        written = lengths_gmem[b]
        length = jnp.minimum(jnp.maximum(written, jnp.int32(0)), jnp.int32(held))
        filled = jax.lax.div(length + (SLOTS - 1), jnp.int32(SLOTS))
        each = jax.lax.div(filled + (splits - 1), jnp.int32(splits))
        start = jnp.minimum(part * each, filled)
        count = jnp.minimum(each, filled - start)
        behind_start = written - start * SLOTS

        @pl.when(w == WARPGROUPS)
        def _bring():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def bring(n, _):
                row, slot = b, (start + n) * SLOTS
                if table_gmem:
                    row = table_gmem[0][b, jax.lax.div(slot, jnp.int32(page))]
                    slot = jax.lax.rem(slot, jnp.int32(page))
                blocks.bring(n, row, pl.ds(slot, SLOTS))
                return ()

            jax.lax.fori_loop(jnp.int32(0), count, bring, ())

        @pl.when(w < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(REGISTERS, action="increase")
            blocks.open()
            plgpu.copy_gmem_to_smem(q_latent_gmem.at[b, rows, columns], q_latent_smem.at[w], q_here)
            pl.when(w == 0)(lambda: plgpu.copy_gmem_to_smem(q_rope_gmem.at[b, rows], q_rope_smem, q_here))
            plgpu.barrier_wait(q_here)

            def multiply(latent, rope):
                def run(sums):
                    for i, half_of_latent in enumerate(latent):
                        plgpu.wgmma(sums, q_latent_smem.at[i], half_of_latent.T)
                    plgpu.wgmma(sums, q_rope_smem, rope.T)
                    return sums[...]

                return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((ROWS, SLOTS), jnp.float32))

            def hide(s, behind):
                """Slots that a query does not see. Row n of all is head n % N of query n // N."""
                row = m * ROWS + plgpu.broadcasted_iota(jnp.int32, s.shape[:1], 0, layout=PER_ROW)
                last = jax.lax.div(row, jnp.int32(N)) + (behind - T)
                slot = plgpu.broadcasted_iota(jnp.int32, s.shape[1:], 0, layout=PER_COLUMN)
                return jnp.where(down(slot, s.shape) <= across(last, s.shape), s, -jnp.inf)

            def absorb(n, state):
                o, m, l = state
                behind = behind_start - n * SLOTS
                s = multiply(*blocks.keys(n, w, behind))
                s = jax.lax.cond(behind < SLOTS + T - 1, lambda s: hide(s, behind), lambda s: s, s)
                new_m = jnp.maximum(m, jnp.max(s, axis=1) * to_log2)
                kept = jnp.exp2(m - new_m)
                p = jnp.exp2(s * to_log2 - across(new_m, s.shape))
                l = l * kept + jnp.sum(p, axis=1)
                o = o * across(kept, o.shape)
                o = add_product(o, p.astype(dtype), blocks.values(n, w, behind), p_smem)
                blocks.leave(n)
                return o, new_m, l

            state = full((ROWS, half), 0.0, TILE), full((ROWS,), LEAST, PER_ROW), full((ROWS,), 0.0, PER_ROW)
            o, largest, l = jax.lax.fori_loop(jnp.int32(0), count, absorb, state)
            some = l > 0
            l = jnp.where(some, l, 1.0)
            o = o * across(1 / l, o.shape)
            if out_dtype == jnp.float32:
                out_gmem[part, b, rows, columns] = o
            else:  # from registers, numbers of 16 bits would leave in halves of sectors; so by way of the queries' place
                meet(q_read)
                q_latent_smem[w] = o.astype(out_dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_latent_smem.at[w], out_gmem.at[part, b, rows, columns])
            lse = jnp.where(some, largest * (1 / LOG2_E) + jnp.log(l), -jnp.inf)

            @pl.when(w == 0)
            def _write_lse():
                lse_gmem[part, b, rows] = lse

            plgpu.wait_smem_to_gmem(0)

    out_PBMC, lse_PBM = plgpu.kernel(
        mla_decode,
        out_type=(
            jax.ShapeDtypeStruct((splits, B, M, C), out_dtype),
            jax.ShapeDtypeStruct((splits, B, M), jnp.float32),
        ),
        scratch_types=[
            plgpu.Barrier(num_arrivals=WARPGROUPS + 1),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            smem((WARPGROUPS, ROWS, half), dtype, WIDTH),
            smem((ROWS, R), dtype, WIDTH),
            *scratch,
            *([smem((WARPGROUPS, ROWS, SLOTS), dtype, WIDTH)] if tile.in_shared_memory else []),
        ],
        grid=(B, splits, M // ROWS),
        grid_names=("batch", "split", "rows"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
    )(lengths_B.astype(jnp.int32), q_latent_BMC, q_rope_BMR, *arrays, *table)
    # Kernels leave what their results vary over out of the types.
    out_PBMC, lse_PBM, _ = vary_alike((out_PBMC, lse_PBM, q_latent_BMC))
    out_PBTNC = out_PBMC[:, :, : T * N].reshape(splits, B, T, N, C)
    lse_PBTN = lse_PBM[:, :, : T * N].reshape(splits, B, T, N)
    if splits == 1:
        return out_PBTNC[0], lse_PBTN[0]
    return combine(list(zip(out_PBTNC, lse_PBTN, strict=True)))


def choose_splits(row_blocks: int, blocks: int, num_sms: int) -> int:
    """The least time if all rows are full: waves of thread blocks, each of which costs some blocks of the cache by itself."""
    return min(
        range(1, min(blocks, num_sms) + 1),
        key=lambda splits: -(-row_blocks * splits // num_sms) * (-(-blocks // splits) + START),
    )


def check(q_latent_BTNC: jax.Array, q_rope_BTNR: jax.Array, cache: AnyCache, scale: float) -> None:
    """Raises Unsupported."""
    C, R = q_latent_BTNC.shape[3], q_rope_BTNR.shape[3]
    slots = cache.arrays[0].shape[1]
    dtypes = {q_latent_BTNC.dtype, *(a.dtype for a in cache.arrays if isinstance(cache, LatentCache))}
    lacks = None
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        lacks = f"has bfloat16 alone, not {', '.join(sorted(map(str, dtypes)))}"
    elif C % (WARPGROUPS * WIDTH) or C > WIDEST or R != WIDTH:
        lacks = f"needs latents of 128, 256, 384 or {WIDEST} and rotary keys of {WIDTH}: these have {C} and {R}"
    elif isinstance(cache, Fp8LatentCache) and C != WIDEST:
        lacks = f"has FP8 latents of {WIDEST} alone: TMA takes rows of whole 16 bytes. These have {C}"
    elif slots % SLOTS:
        what = "a capacity" if cache.page_table_BP is None else "pages"
        lacks = f"needs {what} of a multiple of {SLOTS} slots, not {slots}"
    elif not scale > 0:
        lacks = f"needs a positive scale, not {scale}"
    if lacks is not None:
        raise Unsupported(f"mla_decode on gpu {lacks}")
