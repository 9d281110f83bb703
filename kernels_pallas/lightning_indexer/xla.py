"""The lightning indexer in plain JAX by tiles: memory grows with T and S, never with T·S."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.lightning_indexer import topk as choice
from kernels_pallas.lightning_indexer.tiles import TiledMask, Tiles
from kernels_pallas.vary import full


def select_keys(q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, mask: Mask, *, topk: int) -> jax.Array:
    """The chosen keys [B, T, W], ascending, S for what is missing."""
    tiles = Tiles.of(q_BTIJ, k_BSJ, q_BTIJ.shape[2])
    tiled_mask, k_gbSJ = TiledMask.of(tiles, mask), tiles.cut_keys(k_BSJ)

    def one_block(carry: tuple[()], step: Any, queries: tuple[jax.Array, jax.Array]) -> tuple[tuple[()], jax.Array]:
        q_btIJ, w_btI = queries

        def absorb(start: Any, key_btS: jax.Array) -> jax.Array:
            k_bsJ = jax.lax.dynamic_slice_in_dim(k_gbSJ[tiles.group(step)], start, tiles.chunk, 1)
            score_bts = _scores(_logits(q_btIJ, k_bsJ), w_btI)
            key_bts = jnp.where(tiled_mask.visible(step, start), choice.sortable(score_bts), choice.HIDDEN)
            return jax.lax.dynamic_update_slice_in_dim(key_btS, key_bts, start, 2)

        none_btS = full((tiles.rows, tiles.block, tiles.padded_keys), choice.HIDDEN, jnp.int32, q_BTIJ)
        key_RS = tiled_mask.over_keys(step, absorb, none_btS).reshape(-1, tiles.padded_keys)

        def over_pieces(absorb: Callable, state: Any) -> Any:
            def one_piece(start: Any, state: Any) -> Any:
                return absorb(jax.lax.dynamic_slice_in_dim(key_RS, start, tiles.chunk, 1), state)

            return tiled_mask.over_keys(step, one_piece, state)

        index_RW = jnp.minimum(choice.largest(key_RS, topk, over_pieces), tiles.num_keys)
        return carry, index_RW.reshape(tiles.rows, tiles.block, topk)

    return tiles.over_queries(one_block, (), (q_BTIJ, w_BTI))[1]


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KL to the indexer's softmax and to uniform over the visible keys, and the logsumexp of the index scores, all [B, T]."""
    tiles = Tiles.of(q_BTIJ, k_BSJ, max(q_BTIJ.shape[2], q_BTNK.shape[2]))
    tiled_mask, k_gbSJ, k_gbSZK = TiledMask.of(tiles, mask), tiles.cut_keys(k_BSJ), tiles.cut_keys(k_BSZK)
    dtype = jnp.promote_types(q_BTIJ.dtype, jnp.float32)

    def one_block(carry: tuple[()], step: Any, queries: tuple[jax.Array, ...]) -> tuple[tuple[()], Any]:
        q_btIJ, w_btI, q_btNK, lse_btN = queries

        def absorb(start: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            m_bt, l_bt, score_bt, entropy_bt, count_bt = state
            visible_bts = tiled_mask.visible(step, start)
            k_bsJ, k_bsZK = (
                jax.lax.dynamic_slice_in_dim(a[tiles.group(step)], start, tiles.chunk, 1) for a in (k_gbSJ, k_gbSZK)
            )
            score_bts = _scores(_logits(q_btIJ, k_bsJ), w_btI)
            p_bts = jnp.where(visible_bts, _attention(q_btNK, k_bsZK, lse_btN, scale), 0)
            new_m_bt = jnp.maximum(m_bt, jnp.max(jnp.where(visible_bts, score_bts, -jnp.inf), axis=-1))
            finite_m_bt = jnp.where(new_m_bt == -jnp.inf, 0, new_m_bt)
            e_bts = jnp.where(visible_bts, jnp.exp(score_bts - finite_m_bt[..., None]), 0)
            return (
                new_m_bt,
                l_bt * jnp.exp(m_bt - finite_m_bt) + jnp.sum(e_bts, axis=-1),
                score_bt + jnp.sum(jnp.where(visible_bts, p_bts * score_bts, 0), axis=-1),
                entropy_bt + jnp.sum(_p_log_p(p_bts), axis=-1),
                count_bt + jnp.sum(visible_bts, axis=-1, dtype=dtype),
            )

        shape = (tiles.rows, tiles.block)
        m_bt, *zeros = (full(shape, value, dtype, q_BTIJ) for value in (-jnp.inf, 0, 0, 0, 0))
        m_bt, l_bt, score_bt, entropy_bt, count_bt = tiled_mask.over_keys(step, absorb, (m_bt, *zeros))
        some_bt = count_bt > 0
        lse_bt = jnp.where(some_bt, m_bt + jnp.log(jnp.where(some_bt, l_bt, 1)), 0)
        kl_bt = entropy_bt - score_bt + lse_bt
        uniform_bt = entropy_bt + jnp.log(jnp.maximum(count_bt, 1))
        return carry, (kl_bt, uniform_bt, lse_bt)

    return tiles.over_queries(one_block, (), (q_BTIJ, w_BTI, q_BTNK, lse_BTN))[1]


def dense_kl_gradients(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    k_BSJ: jax.Array,
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    lse_BTN: jax.Array,
    mask: Mask,
    index_lse_BT: jax.Array,
    dkl_BT: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, w and k of the indexer, those of its scores being softmax - p."""
    tiles = Tiles.of(q_BTIJ, k_BSJ, max(q_BTIJ.shape[2], q_BTNK.shape[2]))
    tiled_mask, k_gbSJ, k_gbSZK = TiledMask.of(tiles, mask), tiles.cut_keys(k_BSJ), tiles.cut_keys(k_BSZK)
    dtype = jnp.promote_types(q_BTIJ.dtype, jnp.float32)

    def one_block(dk_gbSJ: jax.Array, step: Any, queries: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        q_btIJ, w_btI, q_btNK, lse_btN, index_lse_bt, dkl_bt = queries
        group = tiles.group(step)

        def absorb(start: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            a_btIJ, dk_bSJ = state
            visible_bts = tiled_mask.visible(step, start)
            k_bsJ, k_bsZK = (jax.lax.dynamic_slice_in_dim(a[group], start, tiles.chunk, 1) for a in (k_gbSJ, k_gbSZK))
            logits_btIs = _logits(q_btIJ, k_bsJ)
            p_bts = _attention(q_btNK, k_bsZK, lse_btN, scale)
            softmax_bts = jnp.exp(_scores(logits_btIs, w_btI) - index_lse_bt[..., None])
            dscore_bts = jnp.where(visible_bts, (softmax_bts - p_bts) * dkl_bt[..., None], 0)
            h_btIs = jnp.where(logits_btIs > 0, dscore_bts[:, :, None], 0).astype(k_bsJ.dtype)
            part_bsJ = _einsum("btIs,btIJ->bsJ", h_btIs, (w_btI[..., None] * q_btIJ).astype(q_btIJ.dtype))
            part_bsJ += jax.lax.dynamic_slice_in_dim(dk_bSJ, start, tiles.chunk, 1)
            dk_bSJ = jax.lax.dynamic_update_slice_in_dim(dk_bSJ, part_bsJ, start, 1)
            return a_btIJ + _einsum("btIs,bsJ->btIJ", h_btIs, k_bsJ), dk_bSJ

        a_btIJ = full(q_btIJ.shape, 0, dtype, q_BTIJ)
        a_btIJ, dk_bSJ = tiled_mask.over_keys(step, absorb, (a_btIJ, dk_gbSJ[group]))
        return dk_gbSJ.at[group].set(dk_bSJ), _query_gradients(a_btIJ, q_btIJ, w_btI)

    dk_gbSJ = full(k_gbSJ.shape, 0, dtype, q_BTIJ)
    queries = (q_BTIJ, w_BTI, q_BTNK, lse_BTN, index_lse_BT, dkl_BT)
    dk_gbSJ, (dq_BTIJ, dw_BTI) = tiles.over_queries(one_block, dk_gbSJ, queries)
    return dq_BTIJ, dw_BTI, tiles.join_keys(dk_gbSJ).astype(k_BSJ.dtype)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KL to the indexer's softmax and to uniform over the selected keys, [B, T], and the gradient of the scores [B, T, W]."""
    tiles = Tiles.of(q_BTIJ, k_BSJ, q_BTIJ.shape[2])
    k_gbSJ, k_gbSZK = tiles.cut_keys(k_BSJ), tiles.cut_keys(k_BSZK)

    def one_block(carry: tuple[()], step: Any, queries: tuple[jax.Array, ...]) -> tuple[tuple[()], Any]:
        q_btIJ, w_btI, q_btNK, lse_btN, index_btW = queries
        group, there_btW = tiles.group(step), _there(index_btW, tiles.num_keys)
        k_btWJ, k_btWZK = (_gather(a[group], index_btW) for a in (k_gbSJ, k_gbSZK))
        score_btW = _scores(_einsum("btIJ,btWJ->btIW", q_btIJ, k_btWJ), w_btI)
        score_btW = jnp.where(there_btW, score_btW, -jnp.inf)
        p_btW = jnp.where(there_btW, _selected_attention(q_btNK, k_btWZK, lse_btN, scale), 0)
        some_bt = there_btW.any(-1)
        m_bt = jnp.where(some_bt, jnp.max(score_btW, axis=-1), 0)
        e_btW = jnp.exp(score_btW - m_bt[..., None])
        l_bt = jnp.where(some_bt, jnp.sum(e_btW, axis=-1), 1)
        entropy_bt = jnp.sum(_p_log_p(p_btW), axis=-1)
        kl_bt = entropy_bt - jnp.sum(jnp.where(there_btW, p_btW * score_btW, 0), axis=-1) + m_bt + jnp.log(l_bt)
        uniform_bt = entropy_bt + jnp.log(jnp.maximum(jnp.sum(there_btW, axis=-1), 1))
        dscore_btW = (e_btW / l_bt[..., None] - p_btW).astype(q_btIJ.dtype)
        return carry, (kl_bt, uniform_bt, dscore_btW)

    return tiles.over_queries(one_block, (), (q_BTIJ, w_BTI, q_BTNK, lse_BTN, index_BTW))[1]


def selected_kl_gradients(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    k_BSJ: jax.Array,
    index_BTW: jax.Array,
    dscore_BTW: jax.Array,
    dkl_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, w and k of the indexer from those of its scores."""
    tiles = Tiles.of(q_BTIJ, k_BSJ, q_BTIJ.shape[2])
    k_gbSJ = tiles.cut_keys(k_BSJ)
    dtype = jnp.promote_types(q_BTIJ.dtype, jnp.float32)

    def one_block(dk_gbSJ: jax.Array, step: Any, queries: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        q_btIJ, w_btI, index_btW, dscore_btW, dkl_bt = queries
        group = tiles.group(step)
        k_btWJ = _gather(k_gbSJ[group], index_btW)
        logits_btIW = _einsum("btIJ,btWJ->btIW", q_btIJ, k_btWJ)
        dscore_btW = dscore_btW * dkl_bt[..., None]
        h_btIW = jnp.where(logits_btIW > 0, dscore_btW[:, :, None], 0).astype(k_btWJ.dtype)
        dk_btWJ = _einsum("btIW,btIJ->btWJ", h_btIW, (w_btI[..., None] * q_btIJ).astype(q_btIJ.dtype))
        rows_b = jnp.arange(tiles.rows, dtype=jnp.int32)[:, None, None]
        dk_bSJ = dk_gbSJ[group].at[rows_b, index_btW].add(dk_btWJ, mode="drop")
        a_btIJ = _einsum("btIW,btWJ->btIJ", h_btIW, k_btWJ)
        return dk_gbSJ.at[group].set(dk_bSJ), _query_gradients(a_btIJ, q_btIJ, w_btI)

    dk_gbSJ = full(k_gbSJ.shape, 0, dtype, q_BTIJ)
    queries = (q_BTIJ, w_BTI, index_BTW, dscore_BTW, dkl_BT)
    dk_gbSJ, (dq_BTIJ, dw_BTI) = tiles.over_queries(one_block, dk_gbSJ, queries)
    return dq_BTIJ, dw_BTI, tiles.join_keys(dk_gbSJ).astype(k_BSJ.dtype)


def recall(
    q_BTNK: jax.Array, k_BSZK: jax.Array, lse_BTN: jax.Array, index_BTW: jax.Array, *, scale: float
) -> jax.Array:
    """Attention that the selected keys hold, [B, T]."""
    tiles = Tiles.of(q_BTNK, k_BSZK, q_BTNK.shape[2])
    k_gbSZK = tiles.cut_keys(k_BSZK)

    def one_block(carry: tuple[()], step: Any, queries: tuple[jax.Array, ...]) -> tuple[tuple[()], jax.Array]:
        q_btNK, lse_btN, index_btW = queries
        k_btWZK = _gather(k_gbSZK[tiles.group(step)], index_btW)
        p_btW = _selected_attention(q_btNK, k_btWZK, lse_btN, scale)
        return carry, jnp.sum(jnp.where(_there(index_btW, tiles.num_keys), p_btW, 0), axis=-1)

    return tiles.over_queries(one_block, (), (q_BTNK, lse_BTN, index_BTW))[1]


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(operands[0].dtype, jnp.float32)
    return jnp.einsum(subscripts, *operands, preferred_element_type=dtype)


def _logits(q_btIJ: jax.Array, k_bsJ: jax.Array) -> jax.Array:
    return _einsum("btIJ,bsJ->btIs", q_btIJ, k_bsJ)


def _scores(logits_btIs: jax.Array, w_btI: jax.Array) -> jax.Array:
    return jnp.sum(jax.nn.relu(logits_btIs) * w_btI[..., None].astype(logits_btIs.dtype), axis=2)


def _attention(q_btNK: jax.Array, k_bsZK: jax.Array, lse_btN: jax.Array, scale: float) -> jax.Array:
    """The mean over heads of the attention's probabilities, [b, t, s]."""
    q_btZGK = q_btNK.reshape(*q_btNK.shape[:2], k_bsZK.shape[2], -1, q_btNK.shape[3])
    return _mean_probability(_einsum("btZGK,bsZK->btZGs", q_btZGK, k_bsZK), lse_btN, scale)


def _selected_attention(q_btNK: jax.Array, k_btWZK: jax.Array, lse_btN: jax.Array, scale: float) -> jax.Array:
    """The same for keys of each query's own, [b, t, W]."""
    q_btZGK = q_btNK.reshape(*q_btNK.shape[:2], k_btWZK.shape[3], -1, q_btNK.shape[3])
    return _mean_probability(_einsum("btZGK,btWZK->btZGW", q_btZGK, k_btWZK), lse_btN, scale)


def _mean_probability(s_btZGs: jax.Array, lse_btN: jax.Array, scale: float) -> jax.Array:
    lse_btZG1 = lse_btN.reshape(*s_btZGs.shape[:4], 1)
    p_btZGs = jnp.where(
        lse_btZG1 == -jnp.inf, 0, jnp.exp(s_btZGs * scale - jnp.where(lse_btZG1 == -jnp.inf, 0, lse_btZG1))
    )
    return jnp.mean(p_btZGs, axis=(2, 3))


def _p_log_p(p: jax.Array) -> jax.Array:
    return jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0)


def _query_gradients(a_btIJ: jax.Array, q_btIJ: jax.Array, w_btI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of q and w; a is the sum over keys, where the logit is positive, of the score's gradient times the key."""
    dq_btIJ = (w_btI[..., None] * a_btIJ).astype(q_btIJ.dtype)
    return dq_btIJ, jnp.sum(q_btIJ * a_btIJ, axis=-1).astype(w_btI.dtype)


def _there(index_btW: jax.Array, num_keys: int) -> jax.Array:
    return (index_btW >= 0) & (index_btW < num_keys)


def _gather(k_bS: jax.Array, index_btW: jax.Array) -> jax.Array:
    """Keys [b, t, W, …]; some key or other where the index names none."""
    rows_b = jnp.arange(k_bS.shape[0], dtype=index_btW.dtype)[:, None, None]
    return k_bS.at[rows_b, index_btW].get(mode="clip")
