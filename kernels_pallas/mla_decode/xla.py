"""Decoding in plain JAX: blocks of the cache under a running softmax, no further than the longest row."""

import itertools

import jax
import jax.numpy as jnp

from kernels_pallas.mla_decode.cache import AnyCache, capacity, read
from kernels_pallas.mla_decode.combine import combine

BLOCK = 512  # slots at a time; a cache of no more is read at once


def decode(
    q_latent_BTNC: jax.Array,
    q_rope_BTNR: jax.Array,
    cache: AnyCache,
    lengths_B: jax.Array,
    scale: float,
    splits: int | None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNC in float32, lse_BTN); one split unless told otherwise, as a loop gains nothing from more."""
    B, T, N, C = q_latent_BTNC.shape
    dtype = cache.dtype(q_latent_BTNC.dtype)
    q_latent_BMC = q_latent_BTNC.reshape(B, T * N, C).astype(dtype)
    q_rope_BMR = q_rope_BTNR.reshape(B, T * N, -1).astype(dtype)
    block = _block(cache)
    num_blocks = -(-capacity(cache) // block)
    end_BM = jnp.repeat(lengths_B[:, None] - T + 1 + jnp.arange(T, dtype=jnp.int32), N, axis=1)

    def absorb(i: jax.Array | int, state: tuple[jax.Array, jax.Array, jax.Array]):
        m_BM, l_BM, o_BMC = state
        # The last block is moved back to lie within the cache, and hides what it has in common with the one before.
        first = i * block
        start = jnp.minimum(first, capacity(cache) - block)
        slot_s = start + jnp.arange(block, dtype=jnp.int32)
        latent_BsC, rope_BsR = read(cache, start, block, dtype)
        # Of what lies behind the length, which may be NaN, nothing may reach the output, not even times zero.
        latent_BsC = jnp.where((slot_s < lengths_B[:, None])[..., None], latent_BsC, 0)
        # Scores are kept slots first: XLA:CPU packs the second operand of a product, and the queries are the smaller one.
        s_BsM = scale * (_dot(latent_BsC, q_latent_BMC, 2, 2) + _dot(rope_BsR, q_rope_BMR, 2, 2))
        slot_s1 = slot_s[:, None]
        s_BsM = jnp.where((slot_s1 >= first) & (slot_s1 < end_BM[:, None]), s_BsM, -jnp.inf)
        new_m_BM = jnp.maximum(m_BM, jnp.max(s_BsM, axis=1))
        finite_m_BM = jnp.where(new_m_BM == -jnp.inf, 0, new_m_BM)
        p_BsM = jnp.exp(s_BsM - finite_m_BM[:, None])
        kept_BM = jnp.exp(m_BM - finite_m_BM)
        l_BM = l_BM * kept_BM + jnp.sum(p_BsM, axis=1)
        return new_m_BM, l_BM, o_BMC * kept_BM[..., None] + _dot(p_BsM.astype(dtype), latent_BsC, 1, 1)

    def part(first: int, end: int) -> tuple[jax.Array, jax.Array]:
        """Attention over the blocks from `first` up to `end`."""
        state = _empty(q_latent_BMC)
        if num_blocks == 1:
            state = absorb(0, state)
        else:
            filled = jnp.clip((jnp.max(lengths_B) + block - 1) // block, first, end)
            state = jax.lax.fori_loop(first, filled, absorb, state)
        m_BM, l_BM, o_BMC = state
        some_BM = l_BM > 0
        l_BM = jnp.where(some_BM, l_BM, 1)
        return o_BMC / l_BM[..., None], jnp.where(some_BM, m_BM + jnp.log(l_BM), -jnp.inf)

    parts = min(splits or 1, num_blocks)
    ends = [-(-num_blocks * i // parts) for i in range(parts + 1)]
    done = [part(first, end) for first, end in itertools.pairwise(ends)]
    out_BMC, lse_BM = done[0] if parts == 1 else combine(done)
    return out_BMC.reshape(B, T, N, C), lse_BM.reshape(B, T, N)


def _block(cache: AnyCache) -> int:
    """Slots of a block: whole pages."""
    page = 1 if cache.page_table_BP is None else cache.arrays[0].shape[1]
    return min(max(BLOCK // page, 1) * page, capacity(cache))


def _empty(q_BMC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maximum, sum and weighted values of no keys. Inside shard_map they vary over the axes that queries vary over."""
    axes = tuple(jax.typeof(q_BMC).manual_axis_type.varying)
    state = (
        jnp.full(q_BMC.shape[:2], -jnp.inf, jnp.float32),
        jnp.zeros(q_BMC.shape[:2], jnp.float32),
        jnp.zeros(q_BMC.shape, jnp.float32),
    )
    return jax.lax.pcast(state, axes, to="varying") if axes else state


def _dot(a_Bxy: jax.Array, b_Bxy: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    dims = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a_Bxy, b_Bxy, dims, preferred_element_type=jnp.float32)
