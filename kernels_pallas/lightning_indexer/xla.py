"""The lightning indexer in plain JAX by tiles: memory grows with T and S, never with T·S."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.lightning_indexer import topk as choice
from kernels_pallas.lightning_indexer.gathers import over_queries
from kernels_pallas.lightning_indexer.selection import Scores
from kernels_pallas.lightning_indexer.tiles import TiledMask, Tiles
from kernels_pallas.select import platform
from kernels_pallas.vary import full


def select_keys(
    q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, k_scale_BS: jax.Array | None, mask: Mask, *, topk: int
) -> jax.Array:
    """The chosen keys [B, T, W], ascending, S for what is missing."""
    return index_scores(q_BTIJ, w_BTI, k_BSJ, k_scale_BS, mask).choose(topk)


def index_scores(
    q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, k_scale_BS: jax.Array | None, mask: Mask
) -> Scores:
    tiles = Tiles.of(q_BTIJ, k_BSJ, q_BTIJ.shape[2])
    tiled_mask, keys = TiledMask.of(tiles, mask), jax.tree.map(tiles.cut_keys, (k_BSJ, k_scale_BS))
    scores = _scores_of_one if tiles.block == 1 and platform() == "cpu" else _scores_of_many

    def of_block(step: Any, q_btIJ: jax.Array, w_btI: jax.Array) -> jax.Array:
        def absorb(start: Any, key_btS: jax.Array) -> jax.Array:
            k_bsJ, k_scale_bs = tiles.keys_at(keys, step, start)
            score_bts = scores(q_btIJ, w_btI, k_bsJ)
            if k_scale_bs is not None:
                score_bts *= k_scale_bs[:, None]
            key_bts = jnp.where(tiled_mask.visible(step, start), choice.sortable(score_bts), choice.HIDDEN)
            return jax.lax.dynamic_update_slice_in_dim(key_btS, key_bts, start, 2)

        none_btS = full((tiles.rows, tiles.block, tiles.padded_keys), choice.HIDDEN, jnp.int32, q_BTIJ)
        return tiled_mask.over_keys(step, absorb, none_btS)

    return Scores(tiled_mask=tiled_mask, queries=(q_BTIJ, w_BTI), of_block=of_block)


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
    tiled_mask, keys = TiledMask.of(tiles, mask), jax.tree.map(tiles.cut_keys, (k_BSJ, k_BSZK))
    dtype = _wide(q_BTIJ)

    def one_block(carry: tuple[()], step: Any, queries: tuple[jax.Array, ...]) -> tuple[tuple[()], Any]:
        q_btIJ, w_btI, q_btNK, lse_btN = queries

        def absorb(start: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            m_bt, l_bt, score_bt, entropy_bt, count_bt = state
            visible_bts = tiled_mask.visible(step, start)
            k_bsJ, k_bsZK = tiles.keys_at(keys, step, start)
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
    tiled_mask, keys = TiledMask.of(tiles, mask), jax.tree.map(tiles.cut_keys, (k_BSJ, k_BSZK))
    dtype = _wide(q_BTIJ)

    def one_block(dk_gbSJ: jax.Array, step: Any, queries: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        q_btIJ, w_btI, q_btNK, lse_btN, index_lse_bt, dkl_bt = queries
        group = tiles.group(step)

        def absorb(start: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            a_btIJ, dk_bSJ = state
            visible_bts = tiled_mask.visible(step, start)
            k_bsJ, k_bsZK = tiles.keys_at(keys, step, start)
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

    dk_gbSJ = full(keys[0].shape, 0, dtype, q_BTIJ)
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

    def some_queries(
        queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...], carry: tuple[()]
    ) -> tuple[Any, tuple[()]]:
        q_mIJ, w_mI, q_mNK, lse_mN, index_mW = queries
        there_mW, (k_mWJ, k_mWX) = _gathered(index_mW, *keys)
        score_mW = jnp.where(there_mW, _selected_scores(_einsum("mWJ,mIJ->mWI", k_mWJ, q_mIJ), w_mI), -jnp.inf)
        p_mW = jnp.where(there_mW, _selected_attention(q_mNK, k_mWX, lse_mN, scale), 0)
        some_m = there_mW.any(-1)
        max_m = jnp.where(some_m, jnp.max(score_mW, axis=-1), 0)
        e_mW = jnp.exp(score_mW - max_m[:, None])
        sum_m = jnp.where(some_m, jnp.sum(e_mW, axis=-1), 1)
        entropy_m = jnp.sum(_p_log_p(p_mW), axis=-1)
        kl_m = entropy_m - jnp.sum(jnp.where(there_mW, p_mW * score_mW, 0), axis=-1) + max_m + jnp.log(sum_m)
        uniform_m = entropy_m + jnp.log(jnp.maximum(jnp.sum(there_mW, axis=-1), 1))
        return (kl_m, uniform_m, (e_mW / sum_m[:, None] - p_mW).astype(q_mIJ.dtype)), carry

    return over_queries(some_queries, (q_BTIJ, w_BTI, q_BTNK, lse_BTN, index_BTW), (k_BSJ, _side_by_side(k_BSZK)), ())[
        0
    ]


def selected_kl_gradients(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    k_BSJ: jax.Array,
    index_BTW: jax.Array,
    dscore_BTW: jax.Array,
    dkl_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, w and k of the indexer from those of its scores."""

    def some_queries(
        queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...], dk_RJ: jax.Array
    ) -> tuple[Any, jax.Array]:
        q_mIJ, w_mI, dscore_mW, dkl_m, index_mW = queries
        there_mW, (k_mWJ,) = _gathered(index_mW, *keys)
        dscore_mW = jnp.where(there_mW, dscore_mW * dkl_m[:, None], 0)
        h_mWI = jnp.where(_einsum("mWJ,mIJ->mWI", k_mWJ, q_mIJ) > 0, dscore_mW[..., None], 0).astype(k_mWJ.dtype)
        dk_mWJ = _einsum("mWI,mIJ->mWJ", h_mWI, (w_mI[..., None] * q_mIJ).astype(q_mIJ.dtype))
        dk_RJ = dk_RJ.at[index_mW].add(dk_mWJ, mode="drop")
        return _query_gradients(_einsum("mWI,mWJ->mIJ", h_mWI, k_mWJ), q_mIJ, w_mI), dk_RJ

    dk_RJ = full((k_BSJ.shape[0] * k_BSJ.shape[1], k_BSJ.shape[2]), 0, _wide(k_BSJ), k_BSJ)
    queries = (q_BTIJ, w_BTI, dscore_BTW, dkl_BT, index_BTW)
    (dq_BTIJ, dw_BTI), dk_RJ = over_queries(some_queries, queries, (k_BSJ,), dk_RJ)
    return dq_BTIJ, dw_BTI, dk_RJ.reshape(k_BSJ.shape).astype(k_BSJ.dtype)


def recall(
    q_BTNK: jax.Array, k_BSZK: jax.Array, lse_BTN: jax.Array, index_BTW: jax.Array, *, scale: float
) -> jax.Array:
    """Attention that the selected keys hold, [B, T]."""

    def some_queries(
        queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...], carry: tuple[()]
    ) -> tuple[Any, tuple[()]]:
        q_mNK, lse_mN, index_mW = queries
        there_mW, (k_mWX,) = _gathered(index_mW, *keys)
        p_mW = _selected_attention(q_mNK, k_mWX, lse_mN, scale)
        return jnp.sum(jnp.where(there_mW, p_mW, 0), axis=-1), carry

    return over_queries(some_queries, (q_BTNK, lse_BTN, index_BTW), (_side_by_side(k_BSZK),), ())[0]


def _side_by_side(k_BSZK: jax.Array) -> jax.Array:
    return k_BSZK.reshape(*k_BSZK.shape[:2], -1)


def _gathered(index_mW: jax.Array, *keys: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Which slots name a key; the keys, in other slots one that the query names, so that nothing else is read."""
    there_mW = index_mW < keys[0].shape[0]
    index_mW = jnp.where(there_mW, index_mW, jnp.min(index_mW, axis=1, keepdims=True))
    return there_mW, [k_R.at[index_mW].get(mode="clip") for k_R in keys]


def _selected_scores(logits_mWI: jax.Array, w_mI: jax.Array) -> jax.Array:
    logits_mWI = jax.lax.optimization_barrier(logits_mWI)  # as in `_scores`
    return jnp.sum(jax.nn.relu(logits_mWI) * w_mI[:, None].astype(logits_mWI.dtype), axis=2)


def _selected_attention(q_mNK: jax.Array, k_mWX: jax.Array, lse_mN: jax.Array, scale: float) -> jax.Array:
    """The mean over heads of the attention's probabilities, [m, W]; the key heads lie side by side, X = Z·K."""
    chunk, slots, width = k_mWX.shape
    if width == q_mNK.shape[2]:  # apart, for with a dim of 1 XLA:CPU copies the keys
        s_mWN = _einsum("mWK,mNK->mWN", k_mWX, q_mNK)
    else:
        k_mWZK = k_mWX.reshape(chunk, slots, -1, q_mNK.shape[2])
        q_mZGK = q_mNK.reshape(chunk, k_mWZK.shape[2], -1, q_mNK.shape[2])
        s_mWN = _einsum("mWZK,mZGK->mWZG", k_mWZK, q_mZGK).reshape(chunk, slots, -1)
    none_m1N = lse_mN[:, None] == -jnp.inf
    return jnp.mean(jnp.where(none_m1N, 0, jnp.exp(s_mWN * scale - jnp.where(none_m1N, 0, lse_mN[:, None]))), axis=2)


def _wide(a: jax.Array) -> jnp.dtype:
    """The dtype of accumulation."""
    return jnp.dtype(jnp.float32) if a.dtype.itemsize < 4 else a.dtype


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    dtype = _wide(operands[0])
    operands = tuple(a.astype(jnp.bfloat16) if a.dtype.itemsize == 1 else a for a in operands)  # FP8, exactly
    return jnp.einsum(subscripts, *operands, preferred_element_type=dtype)


def _logits(q_btIJ: jax.Array, k_bsJ: jax.Array) -> jax.Array:
    return _einsum("btIJ,bsJ->btIs", q_btIJ, k_bsJ)


def _scores(logits_btIs: jax.Array, w_btI: jax.Array) -> jax.Array:
    # Without the barrier XLA:CPU makes one kernel of the product and the sum, which takes five times as long as the two.
    logits_btIs = jax.lax.optimization_barrier(logits_btIs)
    return jnp.sum(jax.nn.relu(logits_btIs) * w_btI[..., None].astype(logits_btIs.dtype), axis=2)


def _scores_of_many(q_btIJ: jax.Array, w_btI: jax.Array, k_bsJ: jax.Array) -> jax.Array:
    return _scores(_logits(q_btIJ, k_bsJ), w_btI)


def _scores_of_one(q_b1IJ: jax.Array, w_b1I: jax.Array, k_bsJ: jax.Array) -> jax.Array:
    """[b, 1, s] of one query. XLA:CPU packs the second operand of a product: here that is the query, not its many keys."""
    logits_bsI = jax.lax.optimization_barrier(_einsum("bsJ,bIJ->bsI", k_bsJ, q_b1IJ[:, 0]))  # as in `_scores`
    return jnp.sum(jax.nn.relu(logits_bsI) * w_b1I.astype(logits_bsI.dtype), axis=2)[:, None]


def _attention(q_btNK: jax.Array, k_bsZK: jax.Array, lse_btN: jax.Array, scale: float) -> jax.Array:
    """The mean over heads of the attention's probabilities, [b, t, s]."""
    q_btZGK = q_btNK.reshape(*q_btNK.shape[:2], k_bsZK.shape[2], -1, q_btNK.shape[3])
    return _mean_probability(_einsum("btZGK,bsZK->btZGs", q_btZGK, k_bsZK), lse_btN, scale)


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
