"""Softmax attention by its equation, in float32 or wider; differentiable by JAX itself."""

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention.mask import Mask


def flash_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    sinks_N: jax.Array | None,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, U] and logsumexp [B, T, N]."""
    dtype = jnp.promote_types(q_BTNK.dtype, jnp.float32)
    repeats = q_BTNK.shape[2] // k_BSZK.shape[2]
    k_BSNK, v_BSNU = (jnp.repeat(a.astype(dtype), repeats, axis=2) for a in (k_BSZK, v_BSZU))
    s_BNTS = scale * jnp.einsum("BTNK,BSNK->BNTS", q_BTNK.astype(dtype), k_BSNK)
    if softcap is not None:
        s_BNTS = softcap * jnp.tanh(s_BNTS / softcap)
    visible_B1TS = mask.array(q_BTNK.shape[0], q_BTNK.shape[1], k_BSZK.shape[1])[:, None]
    sinks_N11 = jnp.full((q_BTNK.shape[2], 1, 1), -jnp.inf, dtype) if sinks_N is None else sinks_N[:, None, None]
    sinks_N11 = sinks_N11.astype(dtype)

    m_BNT1 = jnp.max(jnp.where(visible_B1TS, s_BNTS, -jnp.inf), axis=-1, keepdims=True)
    m_BNT1 = jax.lax.stop_gradient(jnp.maximum(m_BNT1, sinks_N11))
    m_BNT1 = jnp.where(m_BNT1 == -jnp.inf, 0, m_BNT1)
    p_BNTS = jnp.where(visible_B1TS, jnp.exp(jnp.where(visible_B1TS, s_BNTS - m_BNT1, 0)), 0)
    l_BNT1 = jnp.sum(p_BNTS, axis=-1, keepdims=True) + jnp.exp(sinks_N11 - m_BNT1)
    some_BNT1 = l_BNT1 > 0
    l_BNT1 = jnp.where(some_BNT1, l_BNT1, 1)
    lse_BNT1 = jnp.where(some_BNT1, m_BNT1 + jnp.log(l_BNT1), -jnp.inf)
    return jnp.einsum("BNTS,BSNU->BTNU", p_BNTS / l_BNT1, v_BSNU), lse_BNT1[..., 0].swapaxes(1, 2)
