"""The lightning indexer by its equations, in float32 or wider, with whole score matrices; differentiable by JAX itself."""

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention.mask import Mask


def scores(q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array) -> jax.Array:
    """I [B, T, S] of all keys, visible or not."""
    dtype = jnp.float64 if q_BTIJ.dtype == jnp.float64 else jnp.float32
    logits_BTIS = jnp.einsum("BTIJ,BSJ->BTIS", q_BTIJ.astype(dtype), k_BSJ.astype(dtype))
    return jnp.einsum("BTI,BTIS->BTS", w_BTI.astype(dtype), jax.nn.relu(logits_BTIS))


def select_keys(
    q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, k_scale_BS: jax.Array | None, mask: Mask, *, topk: int
) -> jax.Array:
    """The chosen keys [B, T, W], ascending, S for what is missing."""
    num_keys = k_BSJ.shape[1]
    visible_BTS = mask.array(q_BTIJ.shape[0], q_BTIJ.shape[1], num_keys)
    score_BTS = scores(q_BTIJ, w_BTI, k_BSJ) * (1 if k_scale_BS is None else k_scale_BS[:, None])
    score_BTS = jnp.where(visible_BTS, score_BTS, -jnp.inf)
    best_BTW = jnp.argsort(-score_BTS, axis=-1, stable=True)[..., :topk]
    none_BTW = jnp.take_along_axis(score_BTS, best_BTW, axis=-1) == -jnp.inf
    return jnp.sort(jnp.where(none_BTW, num_keys, best_BTW), axis=-1).astype(jnp.int32)


def dense_kl(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    k_BSJ: jax.Array,
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    lse_BTN: jax.Array,
    mask: Mask,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """KL to the indexer's softmax and to uniform, [B, T], over the visible keys."""
    visible_BTS = mask.array(q_BTIJ.shape[0], q_BTIJ.shape[1], k_BSJ.shape[1])
    return _kl(scores(q_BTIJ, w_BTI, k_BSJ), attention(q_BTNK, k_BSZK, lse_BTN, scale), visible_BTS)


def selected_kl(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    k_BSJ: jax.Array,
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    lse_BTN: jax.Array,
    index_BTW: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """KL to the indexer's softmax and to uniform, [B, T], over the selected keys."""
    chosen_BTS = chosen(index_BTW, k_BSJ.shape[1])
    return _kl(scores(q_BTIJ, w_BTI, k_BSJ), attention(q_BTNK, k_BSZK, lse_BTN, scale), chosen_BTS)


def recall(
    q_BTNK: jax.Array, k_BSZK: jax.Array, lse_BTN: jax.Array, index_BTW: jax.Array, *, scale: float
) -> jax.Array:
    """Attention that the selected keys hold, [B, T]."""
    p_BTS = attention(q_BTNK, k_BSZK, lse_BTN, scale)
    return jnp.sum(jnp.where(chosen(index_BTW, k_BSZK.shape[1]), p_BTS, 0), axis=-1)


def attention(q_BTNK: jax.Array, k_BSZK: jax.Array, lse_BTN: jax.Array, scale: float) -> jax.Array:
    """exp(scale q · k - lse), the mean over heads, [B, T, S], of all keys, visible or not; no gradient. 0 where lse is -inf."""
    q_BTNK, k_BSZK, lse_BTN = jax.lax.stop_gradient((q_BTNK, k_BSZK, lse_BTN))
    dtype = jnp.promote_types(q_BTNK.dtype, jnp.float32)
    k_BSNK = jnp.repeat(k_BSZK.astype(dtype), q_BTNK.shape[2] // k_BSZK.shape[2], axis=2)
    s_BTNS = scale * jnp.einsum("BTNK,BSNK->BTNS", q_BTNK.astype(dtype), k_BSNK)
    none_BTN1 = lse_BTN[..., None] == -jnp.inf
    p_BTNS = jnp.where(none_BTN1, 0, jnp.exp(s_BTNS - jnp.where(none_BTN1, 0, lse_BTN[..., None])))
    return jnp.mean(p_BTNS, axis=2)


def chosen(index_BTW: jax.Array, num_keys: int) -> jax.Array:
    """Bool [B, T, S] of a list of keys."""
    return jnp.any(index_BTW[..., None] == jnp.arange(num_keys, dtype=index_BTW.dtype), axis=2)


def _kl(score_BTS: jax.Array, p_BTS: jax.Array, within_BTS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL of p to softmax(score) and to uniform over the keys `within`; 0 for a query that has none."""
    some_BT = within_BTS.any(-1)
    p_BTS = jnp.where(within_BTS, p_BTS, 0)
    minus_entropy_BT = jnp.sum(jnp.where(p_BTS > 0, p_BTS * jnp.log(jnp.where(p_BTS > 0, p_BTS, 1)), 0), axis=-1)
    safe_BTS = jnp.where(within_BTS, score_BTS, jnp.where(some_BT[..., None], -jnp.inf, 0))
    log_q_BTS = jnp.where(within_BTS, safe_BTS - jax.nn.logsumexp(safe_BTS, axis=-1, keepdims=True), 0)
    kl_BT = minus_entropy_BT - jnp.sum(p_BTS * log_q_BTS, axis=-1)
    uniform_BT = minus_entropy_BT + jnp.log(jnp.maximum(within_BTS.sum(-1), 1))
    return jnp.where(some_BT, kl_BT, 0), jax.lax.stop_gradient(jnp.where(some_BT, uniform_BT, 0))
