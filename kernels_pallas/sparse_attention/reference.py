"""Attention over selected keys by its equation, as dense attention in which a key counts as often as it is named."""

import jax
import jax.numpy as jnp


def sparse_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array | None,
    index_BTW: jax.Array,
    *,
    scale: float,
    value_width: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, U] and logsumexp [B, T, N] in float32 or wider."""
    dtype = jnp.promote_types(q_BTNK.dtype, jnp.float32)
    num_keys, repeats = k_BSZK.shape[1], q_BTNK.shape[2] // k_BSZK.shape[2]
    v_BSZU = k_BSZK[..., :value_width] if v_BSZU is None else v_BSZU
    count_BTS = jnp.sum(index_BTW[..., None] == jnp.arange(num_keys), axis=2, dtype=dtype)
    named_BS11 = jnp.any(count_BTS > 0, axis=1)[
        :, :, None, None
    ]  # other keys may hold NaN, which zero times leaves NaN
    k_BSNK, v_BSNU = (jnp.repeat(jnp.where(named_BS11, a.astype(dtype), 0), repeats, axis=2) for a in (k_BSZK, v_BSZU))

    s_BTNS = scale * jnp.einsum("BTNK,BSNK->BTNS", q_BTNK.astype(dtype), k_BSNK, precision="highest")
    s_BTNS = jnp.where(count_BTS[:, :, None] > 0, s_BTNS, -jnp.inf)
    m_BTN1 = jax.lax.stop_gradient(jnp.max(s_BTNS, axis=-1, keepdims=True))
    m_BTN1 = jnp.where(m_BTN1 == -jnp.inf, 0, m_BTN1)
    p_BTNS = count_BTS[:, :, None] * jnp.exp(s_BTNS - m_BTN1)
    l_BTN1 = jnp.sum(p_BTNS, axis=-1, keepdims=True)
    some_BTN1 = jnp.any(count_BTS > 0, axis=-1)[..., None, None]
    l_BTN1 = jnp.where(some_BTN1, l_BTN1, 1)
    lse_BTN1 = jnp.where(some_BTN1, m_BTN1 + jnp.log(l_BTN1), -jnp.inf)
    return jnp.einsum("BTNS,BSNU->BTNU", p_BTNS / l_BTN1, v_BSNU, precision="highest"), lse_BTN1[..., 0]
