"""The public attention over selected keys."""

import functools
import math
from types import ModuleType
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.flash_attention.api import SAVED_NAMES
from kernels_pallas.select import LazyModule, attempt
from kernels_pallas.sparse_attention import reference, xla
from kernels_pallas.vary import vary_alike

Implementation = Literal["xla", "tpu", "gpu", "reference"]
# A back end is a module with `forward` and `backward` as xla.py has them, which raise Unsupported to decline a call; the first is
# the default: no kernel has been timed on a device yet. The reference is differentiated by JAX itself.
BACK_ENDS: dict[str, ModuleType | LazyModule] = {
    "xla": xla,
    "tpu": LazyModule("kernels_pallas.sparse_attention.tpu"),
    "gpu": LazyModule("kernels_pallas.sparse_attention.gpu"),
    "reference": reference,
}


@overload
def sparse_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array | None,
    index_BTW: jax.Array,
    *,
    scale: float,
    value_width: int | None = None,
    implementation: Implementation | None = None,
    return_lse: Literal[False] = False,
) -> jax.Array: ...


@overload
def sparse_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array | None,
    index_BTW: jax.Array,
    *,
    scale: float,
    value_width: int | None = None,
    implementation: Implementation | None = None,
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def sparse_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array | None,
    index_BTW: jax.Array,
    *,
    scale: float,
    value_width: int | None = None,
    implementation: Implementation | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention of each query over the W keys that its indices name. Returns out [B, T, N, U] in q's dtype.

    s = scale * q kᵀ, p = exp(s - lse) over the named keys, out = p v, lse = log(sum(exp(s))); head n reads key head n // (N / Z),
    all heads of a query the same keys (DeepSeek-V3.2-Exp report, section 2.1, eq. 2). index_BTW: signed integers in any order;
    those outside of [0, S) name no key, and a key counts as often as it is named. A query without keys gives zeros and lse = -inf.
    What no query names may hold anything, NaN too.

    v_BSZU=None with value_width=U: the values are the first U numbers of the keys, which are then gathered once (MLA with its
    queries absorbed: one key head of latents and rotary keys, U the latents' width).

    float32 softmax and accumulation (float64 for float64); memory grows with T and S and never with T·S, nor with T·W but for the
    indices. Differentiable, once, in q, k and v, through both results; the gradients of a key are summed in the order of the
    queries. return_lse: also lse [B, T, N] in the dtype of accumulation. The two carry flash_attention's SAVED_NAMES.

    Raises ValueError on what does not fit together, and Unsupported on an implementation that cannot do the call.
    """
    _check(q_BTNK, k_BSZK, v_BSZU, index_BTW, scale, value_width)
    args = vary_alike((q_BTNK, k_BSZK, v_BSZU, index_BTW))

    def run(back_end: Any) -> tuple[jax.Array, jax.Array]:
        if back_end is reference:
            out_BTNU, lse_BTN = reference.sparse_attention(*args, scale=scale, value_width=value_width)
            return out_BTNU.astype(q_BTNK.dtype), lse_BTN
        return _attend(*args, back_end, scale, value_width)  # pyright: ignore[reportGeneralTypeIssues]

    out_BTNU, lse_BTN = attempt("sparse_attention", implementation, BACK_ENDS, run)
    return (out_BTNU, lse_BTN) if return_lse else out_BTNU


def _check(q_BTNK, k_BSZK, v_BSZU, index_BTW, scale, value_width) -> None:
    values = v_BSZU if v_BSZU is not None else k_BSZK
    shapes = f"q {list(q_BTNK.shape)}, k {list(k_BSZK.shape)}, v {None if v_BSZU is None else list(v_BSZU.shape)}"
    wanted = "(need [B, T, N, K], [B, S, Z, K], [B, S, Z, U])"
    if not q_BTNK.ndim == k_BSZK.ndim == values.ndim == 4:
        raise ValueError(f"sparse_attention: wrong ranks: {shapes} {wanted}")
    batch, num_queries, heads, width = q_BTNK.shape
    num_keys, kv_heads = k_BSZK.shape[1:3]
    if k_BSZK.shape != (batch, num_keys, kv_heads, width) or values.shape[:3] != (batch, num_keys, kv_heads):
        raise ValueError(f"sparse_attention: shapes do not fit: {shapes} {wanted}")
    if 0 in q_BTNK.shape + k_BSZK.shape + values.shape:
        raise ValueError(f"sparse_attention: an empty dim: {shapes}")
    if heads % kv_heads:
        raise ValueError(f"sparse_attention: {heads} query heads are not a multiple of {kv_heads} key heads")
    if not (q_BTNK.dtype == k_BSZK.dtype == values.dtype and jnp.issubdtype(q_BTNK.dtype, jnp.floating)):
        raise ValueError(
            f"sparse_attention needs one floating dtype: q {q_BTNK.dtype}, k {k_BSZK.dtype}, v {values.dtype}"
        )
    if (v_BSZU is None) == (value_width is None):
        raise ValueError(
            f"sparse_attention: give v or value_width, one of the two; value_width={value_width}, {shapes}"
        )
    if value_width is not None and not 0 < value_width <= width:
        raise ValueError(f"sparse_attention: value_width={value_width} must be in 1..{width}, the width of the keys")
    if (
        index_BTW.ndim != 3
        or index_BTW.shape[:2] != (batch, num_queries)
        or not jnp.issubdtype(index_BTW.dtype, jnp.signedinteger)
    ):
        raise ValueError(
            f"sparse_attention needs indices int32 [{batch}, {num_queries}, W], got {index_BTW.dtype} {list(index_BTW.shape)}"
        )
    if index_BTW.shape[2] == 0:
        raise ValueError("sparse_attention: index_BTW has no slots; select at least one key a query")
    if not math.isfinite(scale):
        raise ValueError(f"sparse_attention: scale={scale} is not finite")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q_BTNK, k_BSZK, v_BSZU, index_BTW, back_end, scale, value_width) -> tuple[jax.Array, jax.Array]:
    return back_end.forward(q_BTNK, k_BSZK, v_BSZU, index_BTW, scale=scale, value_width=value_width)


def _attend_fwd(q_BTNK, k_BSZK, v_BSZU, index_BTW, back_end, scale, value_width):
    results = back_end.forward(q_BTNK, k_BSZK, v_BSZU, index_BTW, scale=scale, value_width=value_width)
    out_BTNU, lse_BTN = map(checkpoint_name, results, SAVED_NAMES)
    return (out_BTNU, lse_BTN), (q_BTNK, k_BSZK, v_BSZU, index_BTW, out_BTNU, lse_BTN)


def _attend_bwd(back_end, scale, value_width, residuals, cotangents):
    q_BTNK, k_BSZK, v_BSZU, index_BTW, out_BTNU, lse_BTN = residuals
    dout_BTNU, dlse_BTN = cotangents
    # ds = p (dp - rowsum(p dp) + dlse), and rowsum(p dp) = rowsum(out dout); where lse is -inf there is nothing to pass on.
    delta_BTN = jnp.sum(out_BTNU.astype(lse_BTN.dtype) * dout_BTNU, axis=-1)
    delta_BTN -= jnp.where(lse_BTN == -jnp.inf, 0, dlse_BTN)
    grads = back_end.backward(q_BTNK, k_BSZK, v_BSZU, index_BTW, lse_BTN, dout_BTNU, delta_BTN, scale=scale)
    return *grads, None


_attend.defvjp(_attend_fwd, _attend_bwd)
