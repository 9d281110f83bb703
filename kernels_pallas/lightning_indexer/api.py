"""The public ops of the lightning indexer: DeepSeek-V3.2-Exp report, section 2.1, equations 1 to 4."""

import functools
import math
from types import ModuleType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.lightning_indexer import reference, xla
from kernels_pallas.select import LazyModule, attempt, select
from kernels_pallas.vary import vary_alike

SAVED_NAMES = ("indexer_dscore",)  # [B, T, W] of selected_kl; kept, no remat policy makes its forward pass run twice

Implementation = Literal["xla", "reference", "tpu", "gpu"]
# A back end is a module with the functions of xla.py, which raise Unsupported to decline a call; the first is the default: no
# kernel has been timed on a device yet. The reference is differentiated by JAX itself.
BACK_ENDS: dict[str, ModuleType | LazyModule] = {
    "xla": xla,
    "reference": reference,
    "tpu": LazyModule("kernels_pallas.lightning_indexer.tpu"),
    "gpu": LazyModule("kernels_pallas.lightning_indexer.gpu"),
}


class IndexerKl(NamedTuple):
    """Per query, in nats: the loss of the indexer, and what it must beat. Both are 0 for a query that has no keys."""

    kl_BT: jax.Array  # KL(p || softmax(scores)); differentiable in the indexer's q, w and k only
    uniform_BT: jax.Array  # KL(p || the uniform distribution over the same keys); no gradient


def select_keys(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    k_BSJ: jax.Array,
    *,
    mask: Mask,
    topk: int,
    k_scale_BS: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The `topk` visible keys of each query with the highest index scores. Returns index_BTW int32, W = topk.

    score = sum over heads of w * relu(q . k) (eq. 1), with nothing else in it: the caller folds the factors J^-0.5 and I^-0.5 of
    the published models into w, which may have either sign. float32 scores (float64 for float64), whatever the dtype of q and k.
    Exact: of equal scores the earlier keys win, and a hidden key or a score of -inf is never selected. Each query's keys ascend;
    where it sees fewer than topk, S stands behind them, which names no key. No gradient. Memory grows with T, S and T·W.

    k_scale_BS: factors above zero by which a key's scores are multiplied after the sum over heads; `to_fp8` gives those of FP8.

    Raises ValueError on what does not fit together, topk > S among it, and Unsupported on an implementation that is not there.
    """
    _check_indexer("select_keys", q_BTIJ, w_BTI, k_BSJ)
    mask.check(q_BTIJ.shape[0], q_BTIJ.shape[1], k_BSJ.shape[1])
    if not 1 <= topk <= k_BSJ.shape[1]:
        raise ValueError(
            f"select_keys: topk={topk} must be at least 1 and at most the number of keys, {k_BSJ.shape[1]}"
        )
    if k_scale_BS is not None and k_scale_BS.shape != k_BSJ.shape[:2]:
        raise ValueError(f"select_keys: k_scale must be {list(k_BSJ.shape[:2])}, got {list(k_scale_BS.shape)}")
    args = vary_alike(jax.lax.stop_gradient((q_BTIJ, w_BTI, k_BSJ, k_scale_BS, mask)))
    run = lambda back_end: back_end.select_keys(*args, topk=topk)  # noqa: E731
    return attempt("select_keys", implementation, BACK_ENDS, run)


def dense_kl(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    k_BSJ: jax.Array,
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    lse_BTN: jax.Array,
    *,
    scale: float,
    mask: Mask,
    implementation: Implementation | None = None,
) -> IndexerKl:
    """The warm-up loss of an indexer (eq. 3): KL of the attention that it serves to its own softmax, over all visible keys.

    p = mean over heads of exp(scale * q kᵀ - lse), where head n reads key head n // (N / Z) and lse_BTN is what
    `flash_attention(..., return_lse=True)` says for the same q, k, scale and mask, without sinks: p sums to 1.
    float32 results. Gradients, once, of q_BTIJ, w_BTI and k_BSJ through kl_BT: that of a score is softmax(scores) - p. To q_BTNK,
    k_BSZK and lse_BTN nothing passes. Memory grows with T and S; the backward pass makes p and the scores again.

    Raises ValueError on what does not fit together, and Unsupported on an implementation that is not there.
    """
    _check_indexer("dense_kl", q_BTIJ, w_BTI, k_BSJ)
    _check_attention("dense_kl", q_BTIJ.shape[:2], k_BSJ.shape[1], q_BTNK, k_BSZK, lse_BTN, scale)
    mask.check(q_BTIJ.shape[0], q_BTIJ.shape[1], k_BSJ.shape[1])
    back_end = select("dense_kl", implementation, BACK_ENDS)
    args = vary_alike((q_BTIJ, w_BTI, k_BSJ, *jax.lax.stop_gradient((q_BTNK, k_BSZK, lse_BTN, mask))))
    if back_end is reference:
        return IndexerKl(*reference.dense_kl(*args, scale=scale))
    return IndexerKl(*_dense_kl(*args, back_end, scale))  # pyright: ignore[reportGeneralTypeIssues]


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
    implementation: Implementation | None = None,
) -> IndexerKl:
    """The loss of an indexer beside sparse attention (eq. 4): as `dense_kl`, over the selected keys only.

    Both distributions are normalised over the keys that index_BTW names, each once, as `select_keys` gives them; an index outside
    of [0, S) names none. lse_BTN is what `sparse_attention(..., return_lse=True)` says for the same q, k, index and scale.
    float32 results. Gradients as of `dense_kl`. For them the forward pass keeps [B, T, W] numbers in q_BTIJ's dtype, which carry
    the name SAVED_NAMES for remat policies, so that no key of the attention is read again.

    Raises ValueError on what does not fit together, and Unsupported on an implementation that is not there.
    """
    _check_indexer("selected_kl", q_BTIJ, w_BTI, k_BSJ)
    _check_attention("selected_kl", q_BTIJ.shape[:2], k_BSJ.shape[1], q_BTNK, k_BSZK, lse_BTN, scale)
    _check_index("selected_kl", q_BTIJ.shape[:2], index_BTW)
    back_end = select("selected_kl", implementation, BACK_ENDS)
    args = vary_alike((q_BTIJ, w_BTI, k_BSJ, *jax.lax.stop_gradient((q_BTNK, k_BSZK, lse_BTN)), index_BTW))
    if back_end is reference:
        return IndexerKl(*reference.selected_kl(*args, scale=scale))
    return IndexerKl(*_selected_kl(*args, back_end, scale))  # pyright: ignore[reportGeneralTypeIssues]


def recall(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    lse_BTN: jax.Array,
    index_BTW: jax.Array,
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The share of dense attention that the selected keys hold, the mean over heads; [B, T] float32, without gradient.

    lse_BTN is that of the dense attention; index_BTW as in `selected_kl`. 0 for a query that sees nothing.

    Raises ValueError on what does not fit together, and Unsupported on an implementation that is not there.
    """
    _check_attention("recall", q_BTNK.shape[:2], k_BSZK.shape[1], q_BTNK, k_BSZK, lse_BTN, scale)
    _check_index("recall", q_BTNK.shape[:2], index_BTW)
    back_end = select("recall", implementation, BACK_ENDS)
    args = vary_alike((*jax.lax.stop_gradient((q_BTNK, k_BSZK, lse_BTN)), index_BTW))
    return back_end.recall(*args, scale=scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _dense_kl(q_BTIJ, w_BTI, k_BSJ, q_BTNK, k_BSZK, lse_BTN, mask, back_end, scale):
    return back_end.dense_kl(q_BTIJ, w_BTI, k_BSJ, q_BTNK, k_BSZK, lse_BTN, mask, scale=scale)[:2]


def _dense_kl_fwd(*args):
    *arrays, back_end, scale = args
    kl_BT, uniform_BT, index_lse_BT = back_end.dense_kl(*arrays, scale=scale)
    return (kl_BT, uniform_BT), (*arrays, index_lse_BT)


def _dense_kl_bwd(back_end, scale, residuals, cotangents):
    gradients = back_end.dense_kl_gradients(*residuals, cotangents[0], scale=scale)
    return *gradients, None, None, None, None


_dense_kl.defvjp(_dense_kl_fwd, _dense_kl_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _selected_kl(q_BTIJ, w_BTI, k_BSJ, q_BTNK, k_BSZK, lse_BTN, index_BTW, back_end, scale):
    return back_end.selected_kl(q_BTIJ, w_BTI, k_BSJ, q_BTNK, k_BSZK, lse_BTN, index_BTW, scale=scale)[:2]


def _selected_kl_fwd(*args):
    *arrays, back_end, scale = args
    kl_BT, uniform_BT, dscore_BTW = back_end.selected_kl(*arrays, scale=scale)
    q_BTIJ, w_BTI, k_BSJ, *_, index_BTW = arrays
    return (kl_BT, uniform_BT), (q_BTIJ, w_BTI, k_BSJ, index_BTW, checkpoint_name(dscore_BTW, SAVED_NAMES[0]))


def _selected_kl_bwd(back_end, scale, residuals, cotangents):
    return *back_end.selected_kl_gradients(*residuals, cotangents[0]), None, None, None, None


_selected_kl.defvjp(_selected_kl_fwd, _selected_kl_bwd)


def _check_indexer(op: str, q_BTIJ, w_BTI, k_BSJ) -> None:
    shapes = f"q {list(q_BTIJ.shape)}, w {list(w_BTI.shape)}, k {list(k_BSJ.shape)}"
    if q_BTIJ.ndim != 4 or w_BTI.shape != q_BTIJ.shape[:3] or k_BSJ.ndim != 3:
        raise ValueError(f"{op}: shapes do not fit: {shapes} (need [B, T, I, J], [B, T, I], [B, S, J])")
    if (k_BSJ.shape[0], k_BSJ.shape[2]) != (q_BTIJ.shape[0], q_BTIJ.shape[3]):
        raise ValueError(f"{op}: shapes do not fit: {shapes} (need [B, T, I, J], [B, T, I], [B, S, J])")
    if 0 in q_BTIJ.shape + k_BSJ.shape:
        raise ValueError(f"{op}: an empty dim: {shapes}")
    floats = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (q_BTIJ, w_BTI))
    if q_BTIJ.dtype != k_BSJ.dtype or not floats:
        raise ValueError(
            f"{op} needs q and k of one floating dtype and floating w: q {q_BTIJ.dtype}, w {w_BTI.dtype}, k {k_BSJ.dtype}"
        )


def _check_attention(op: str, rows: tuple[int, ...], num_keys: int, q_BTNK, k_BSZK, lse_BTN, scale) -> None:
    shapes = f"q {list(q_BTNK.shape)}, k {list(k_BSZK.shape)}, lse {list(lse_BTN.shape)}"
    wanted = f"(need [{rows[0]}, {rows[1]}, N, K], [{rows[0]}, {num_keys}, Z, K], [{rows[0]}, {rows[1]}, N])"
    fits = q_BTNK.ndim == k_BSZK.ndim == 4 and lse_BTN.shape == q_BTNK.shape[:3] and q_BTNK.shape[:2] == rows
    if not fits or k_BSZK.shape[:2] != (rows[0], num_keys) or k_BSZK.shape[3] != q_BTNK.shape[3]:
        raise ValueError(f"{op}: shapes of the attention do not fit: {shapes} {wanted}")
    if 0 in q_BTNK.shape + k_BSZK.shape:
        raise ValueError(f"{op}: an empty dim: {shapes}")
    if q_BTNK.shape[2] % k_BSZK.shape[2]:
        raise ValueError(f"{op}: {q_BTNK.shape[2]} query heads are not a multiple of {k_BSZK.shape[2]} key heads")
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (q_BTNK, k_BSZK, lse_BTN)):
        raise ValueError(f"{op}: the attention must be floats: {q_BTNK.dtype}, {k_BSZK.dtype}, {lse_BTN.dtype}")
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale={scale} is not finite")


def _check_index(op: str, rows: tuple[int, ...], index_BTW) -> None:
    if index_BTW.ndim != 3 or index_BTW.shape[:2] != rows or not index_BTW.shape[2]:
        raise ValueError(f"{op}: the index must be [{rows[0]}, {rows[1]}, W], got {list(index_BTW.shape)}")
    if not jnp.issubdtype(index_BTW.dtype, jnp.signedinteger):
        raise ValueError(f"{op}: the index must be signed integers, got {index_BTW.dtype}")
