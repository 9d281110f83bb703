"""Decoding over latents as a Mosaic TPU kernel: all queries of a row meet each block of its cache once, as keys and as values."""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.tpu_walk import HIDDEN, LOG2_E, lanes
from kernels_pallas.mla_decode.cache import AnyCache, Fp8LatentCache, capacity
from kernels_pallas.mla_decode.combine import combine
from kernels_pallas.mla_decode.tpu_blocks import LANES, Blocks
from kernels_pallas.select import Unsupported

SLOTS = 1024  # of a block
SLOTS_AT_ONCE = 512  # of the logits that are in VMEM
MOST_ROWS = 1024  # of queries times heads: their sums and logits take 8 MiB of VMEM
VMEM_BYTES = 56 << 20  # of the 64 MiB that the chips with least have


def decode(
    q_latent_BTNC: jax.Array,
    q_rope_BTNR: jax.Array,
    cache: AnyCache,
    lengths_B: jax.Array,
    scale: float,
    splits: int | None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNC, in float32 if split, lse_BTN); as many splits as cores share a grid: on one core they only follow each other."""
    B, T, N, C = q_latent_BTNC.shape
    if T * N > MOST_ROWS:
        raise Unsupported(
            f"mla_decode on TPU takes {MOST_ROWS} queries times heads a row, not {T * N}; 'xla' takes more"
        )
    parts = splits or _cores()
    blocks = Blocks.of(cache, B, parts, SLOTS)
    dtype = cache.dtype(q_latent_BTNC.dtype)
    if isinstance(cache, Fp8LatentCache):
        if q_rope_BTNR.shape[-1] % 2:
            raise Unsupported("mla_decode on TPU takes FP8 rows of whole words, so an even number of rotary dims")
        q_rope_BTNR = _even_then_odd(q_rope_BTNR)
    q_latent_BMC, q_rope_BMR = (_rows(q.astype(dtype)) for q in (q_latent_BTNC, q_rope_BTNR))
    M, R = q_rope_BMR.shape[1:]
    scalars = [lengths_B.astype(jnp.int32), *blocks.scalars(lengths_B)]
    at_once = min(SLOTS_AT_ONCE, blocks.slots)
    chunks = [slice(start, min(start + at_once, blocks.slots)) for start in range(0, blocks.slots, at_once)]

    def kernel(*refs):
        (length_ref, *scalar_refs), refs = refs[: len(scalars)], refs[len(scalars) :]
        q_latent_ref, q_rope_ref, cache_refs, o_ref, lse_ref, m_ref, l_ref, acc_ref, scratch = refs
        m_ref[...] = jnp.full(m_ref.shape, HIDDEN, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

        def take_in(refs: list, chunks: list[slice], seen: jax.Array | None, held: jax.Array) -> None:
            """`seen` of the block's slots by the first query, and `held`; None if all by all."""
            taken, logits = [_unpack(cache, refs, chunk, dtype) for chunk in chunks], []
            # All logits first, so that the matrix units have work while the first are exponentiated.
            for chunk, (latent, slot_axis, rope) in zip(chunks, taken, strict=True):
                s = _dot(q_latent_ref[...], latent, 1 - slot_axis) + _dot(q_rope_ref[...], rope, 0)
                s *= scale * LOG2_E
                if seen is not None:
                    row, slot = (jax.lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
                    more = sum((row >= t * N).astype(jnp.int32) for t in range(1, T))
                    s = jnp.where(chunk.start + slot < jnp.minimum(seen + more, held), s, HIDDEN)
                logits.append(s)
            m, l = m_ref[...], l_ref[...]
            for chunk, s, (latent, slot_axis, _) in zip(chunks, logits, taken, strict=True):
                if seen is not None:  # what lies behind the length may be NaN
                    slot = chunk.start + jax.lax.broadcasted_iota(jnp.int32, latent.shape, slot_axis)
                    latent = jnp.where(slot < held, latent, 0)
                m_before, m = m, jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
                p = jnp.exp2(s - lanes(m, s.shape[1]))
                kept = jnp.exp2(m_before - m)
                # A sum in each lane: those of lanes are added up once, at the end.
                l = l * kept + sum(p[:, i : i + LANES] for i in range(0, p.shape[1], LANES))
                acc_ref[...] = acc_ref[...] * lanes(kept, C) + _dot(p.astype(dtype), latent, slot_axis)
            m_ref[...], l_ref[...] = m, l

        def absorb(first_slot: jax.Array, held: jax.Array, refs: list) -> None:
            seen = length_ref[pl.program_id(1)] - (T - 1) - first_slot
            whole = jnp.minimum(seen, held) >= blocks.slots
            pl.when(whole)(lambda: take_in(refs, chunks, None, held))

            @pl.when(jnp.logical_not(whole))
            def _():
                for chunk in chunks:
                    pl.when(chunk.start < held)(lambda c=chunk: take_in(refs, [c], seen, held))

        blocks.walk(scalar_refs, cache_refs, scratch, absorb)
        nothing = m_ref[...] < HIDDEN / 2  # which NaN is not
        total = jnp.where(nothing, 1.0, jnp.sum(l_ref[...], axis=1, keepdims=True))
        o_ref[...] = jnp.where(lanes(nothing, C), 0, acc_ref[...] / lanes(total, C)).astype(o_ref.dtype)
        lse_ref[...] = jnp.where(nothing, -jnp.inf, m_ref[...] * (1 / LOG2_E) + jnp.log(total)).T[:1]

    varies = jax.typeof(q_latent_BTNC).manual_axis_type
    num_slots = B * capacity(cache)
    out_PBMC, lse_PB1M = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(parts, B),
            in_specs=[
                pl.BlockSpec((None, M, C), lambda split, row, *_: (row, 0, 0)),
                pl.BlockSpec((None, M, R), lambda split, row, *_: (row, 0, 0)),
                blocks.specs,
            ],
            out_specs=[
                pl.BlockSpec((None, None, M, C), lambda split, row, *_: (split, row, 0, 0)),
                pl.BlockSpec((None, None, 1, M), lambda split, row, *_: (split, row, 0, 0)),
            ],
            scratch_shapes=[
                *(pltpu.VMEM((M, width), jnp.float32) for width in (LANES, LANES, C)),
                blocks.scratch,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(
                (parts, B, M, C), q_latent_BTNC.dtype if parts == 1 else jnp.float32, manual_axis_type=varies
            ),
            jax.ShapeDtypeStruct((parts, B, 1, M), jnp.float32, manual_axis_type=varies),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_slots * M * (2 * C + R),
            transcendentals=num_slots * M,
            bytes_accessed=num_slots * sum(a.shape[-1] * a.dtype.itemsize for a in cache.arrays),
        ),
        name="mla_decode",
    )(*scalars, q_latent_BMC, q_rope_BMR, blocks.arrays)
    done = [(out_PBMC[part, :, : T * N], lse_PB1M[part, :, 0, : T * N]) for part in range(parts)]
    out_BMC, lse_BM = done[0] if parts == 1 else combine(done)
    return out_BMC.reshape(B, T, N, C), lse_BM.reshape(B, T, N)


def _cores() -> int:
    """That share a grid."""
    return pltpu.get_tpu_info().num_cores if pltpu.is_tpu_device() else 1


def _generation() -> int:
    """Of the chip; of none, where the kernel is interpreted, 0."""
    return pltpu.get_tpu_info().generation if pltpu.is_tpu_device() else 0


def _rows(q_BTNC: jax.Array) -> jax.Array:
    """[B, T·N, C], padded to whole registers."""
    B, T, N, C = q_BTNC.shape
    sublanes = 32 // q_BTNC.dtype.itemsize
    return jnp.pad(q_BTNC.reshape(B, T * N, C), ((0, 0), (0, -T * N % sublanes), (0, 0)))


def _dot(a: jax.Array, b: jax.Array, b_axis: int) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _even_then_odd(a: jax.Array) -> jax.Array:
    return jnp.concatenate([a[..., 0::2], a[..., 1::2]], axis=-1)


def _unpack(cache: AnyCache, refs: list, slots: slice, dtype: jnp.dtype) -> tuple[jax.Array, int, jax.Array]:
    """The latent [slots, C] or, of FP8 rows, [C, slots], the axis of its slots, and the rotary keys [R, slots].

    Of FP8 rows these have their even numbers first: four bytes of a slot are one lane of a register, two bfloat16.
    """
    if not isinstance(cache, Fp8LatentCache):
        return refs[0][slots, :].astype(dtype), 0, refs[1][:, slots].astype(dtype)
    (rows_ref,), C = refs, cache.latent_width
    num_tiles = C // LANES
    words = pltpu.bitcast(rows_ref[C:, slots], jnp.int32)
    scales = jax.lax.bitcast_convert_type(words[:num_tiles], jnp.float32)
    pairs = words[num_tiles:]
    halves = (pairs << 16, pairs & jnp.int32(-(1 << 16)))
    rope = jnp.concatenate([jax.lax.bitcast_convert_type(half, jnp.float32).astype(dtype) for half in halves], axis=0)
    tiles = []
    for i in range(num_tiles):
        data, factor = _from_e4m3(rows_ref[i * LANES : (i + 1) * LANES, slots])
        tiles.append((data * (factor * scales[i : i + 1])).astype(dtype))
    return jnp.concatenate(tiles, axis=0), 1, rope


def _from_e4m3(codes: jax.Array) -> tuple[jax.Array, float]:
    """(float32, what it is to be multiplied by), from the bytes of e4m3fn.

    Before generation 7, chips convert e4m3b11fnuz only; to make that of e4m3fn takes less than to convert e4m3fn without them. The
    same code is a sixteenth of the value there, but minus zero is the only NaN, and what is NaN in e4m3fn is a number.
    """
    if _generation() >= 7:
        return pltpu.bitcast(codes, jnp.float8_e4m3fn).astype(jnp.float32), 1.0
    words = pltpu.bitcast(codes, jnp.int32)  # of four codes each
    magnitudes = words & 0x7F7F7F7F
    words &= (magnitudes + 0x7F7F7F7F) | 0x7F7F7F7F  # no zero keeps its sign
    nan = (magnitudes + 0x01010101) & jnp.int32(-0x7F7F7F80)  # the upper bits of those codes
    words = (words | nan) & ~(nan - jax.lax.shift_right_logical(nan, 7))
    return pltpu.bitcast(words, jnp.float8_e4m3b11fnuz).astype(jnp.float32), 16.0
