"""Softmax attention by its equation, in float32; a query that sees nothing gives zeros."""

import jax
import jax.numpy as jnp


def flash_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    *,
    scale: float,
    causal: bool,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    mask_BTS: jax.Array | None,
) -> jax.Array:
    repeats = q_BTNK.shape[2] // k_BSZK.shape[2]
    k_BSNK, v_BSNU = (jnp.repeat(a.astype(jnp.float32), repeats, axis=2) for a in (k_BSZK, v_BSZU))
    logits_BNTS = scale * jnp.einsum("BTNK,BSNK->BNTS", q_BTNK.astype(jnp.float32), k_BSNK)
    visible_BTS = q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]
    visible_BTS &= (q_segment_ids_BT != 0)[:, :, None]
    if causal:
        visible_BTS &= kv_positions_BS[:, None, :] <= q_positions_BT[:, :, None]
    if mask_BTS is not None:
        visible_BTS &= mask_BTS
    p_BNTS = jax.nn.softmax(logits_BNTS, axis=-1, where=visible_BTS[:, None])
    return jnp.einsum("BNTS,BSNU->BTNU", jnp.where(visible_BTS[:, None], p_BNTS, 0), v_BSNU)
