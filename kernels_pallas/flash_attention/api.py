"""The public attention op."""

import functools
import math
from types import ModuleType
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.flash_attention import reference, xla
from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.select import LazyModule, attempt
from kernels_pallas.vary import vary_alike

SAVED_NAMES = ("attention_out", "attention_lse")  # with these kept, no remat policy makes the forward pass run twice

Implementation = Literal["xla", "tpu", "gpu", "reference"]
# A back end is a module with `forward` and `backward` as xla.py has them, which raise Unsupported to decline a call; the first is
# the default: no kernel has been timed on a device yet. The reference is differentiated by JAX itself.
BACK_ENDS: dict[str, ModuleType | LazyModule] = {
    "xla": xla,
    "tpu": LazyModule("kernels_pallas.flash_attention.tpu"),
    "gpu": LazyModule("kernels_pallas.flash_attention.gpu"),
    "reference": reference,
}


@overload
def flash_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    *,
    scale: float,
    mask: Mask,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    implementation: Implementation | None = None,
    return_lse: Literal[False] = False,
) -> jax.Array: ...


@overload
def flash_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    *,
    scale: float,
    mask: Mask,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    implementation: Implementation | None = None,
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def flash_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    *,
    scale: float,
    mask: Mask,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    implementation: Implementation | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention with grouped heads: head n reads key-value head n // (N / Z). Returns out [B, T, N, U] in q's dtype.

    s = scale * q kᵀ, then softcap * tanh(s / softcap) if given; p = exp(s - lse) over the keys that `mask` shows; out = p v.
    lse = log(sum(exp(s)) + exp(sink)), where `sinks` [N] are logits, neither scaled nor capped, of a key of value 0 that every
    query of a head sees (gpt-oss). A query that sees nothing gives zeros, and lse = -inf unless there is a sink.

    float32 softmax and accumulation (float64 for float64). Differentiable, once, in q, k, v and sinks, through both results.
    return_lse: also lse [B, T, N] in the dtype of accumulation. The two carry the names SAVED_NAMES for remat policies.

    Raises ValueError on what does not fit together, and Unsupported on an implementation that cannot do the call.
    """
    _check(q_BTNK, k_BSZK, v_BSZU, mask, scale, softcap, sinks)
    args = vary_alike((q_BTNK, k_BSZK, v_BSZU, sinks, mask))

    def run(back_end: Any) -> tuple[jax.Array, jax.Array]:
        if back_end is reference:
            out_BTNU, lse_BTN = reference.flash_attention(*args, scale=scale, softcap=softcap)
            return out_BTNU.astype(q_BTNK.dtype), lse_BTN
        return _attend(*args, back_end, scale, softcap)  # pyright: ignore[reportGeneralTypeIssues]

    out_BTNU, lse_BTN = attempt("flash_attention", implementation, BACK_ENDS, run)
    return (out_BTNU, lse_BTN) if return_lse else out_BTNU


def _check(q_BTNK, k_BSZK, v_BSZU, mask: Mask, scale, softcap, sinks) -> None:
    shapes = f"q {list(q_BTNK.shape)}, k {list(k_BSZK.shape)}, v {list(v_BSZU.shape)}"
    wanted = "(need [B, T, N, K], [B, S, Z, K], [B, S, Z, U])"
    if not q_BTNK.ndim == k_BSZK.ndim == v_BSZU.ndim == 4:
        raise ValueError(f"flash_attention: wrong ranks: {shapes} {wanted}")
    batch, num_queries, heads, width = q_BTNK.shape
    num_keys, kv_heads = k_BSZK.shape[1:3]
    if k_BSZK.shape != (batch, num_keys, kv_heads, width) or v_BSZU.shape[:3] != (batch, num_keys, kv_heads):
        raise ValueError(f"flash_attention: shapes do not fit: {shapes} {wanted}")
    if 0 in q_BTNK.shape + k_BSZK.shape + v_BSZU.shape:
        raise ValueError(f"flash_attention: an empty dim: {shapes}")
    if heads % kv_heads:
        raise ValueError(f"flash_attention: {heads} query heads are not a multiple of {kv_heads} key heads")
    if not (q_BTNK.dtype == k_BSZK.dtype == v_BSZU.dtype and jnp.issubdtype(q_BTNK.dtype, jnp.floating)):
        raise ValueError(
            f"flash_attention needs one floating dtype: q {q_BTNK.dtype}, k {k_BSZK.dtype}, v {v_BSZU.dtype}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"flash_attention: scale={scale} is not finite")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"flash_attention: softcap={softcap} must be positive and finite; None caps nothing")
    if sinks is not None and (sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        raise ValueError(f"flash_attention: sinks must be floats [{heads}], got {sinks.dtype} {list(sinks.shape)}")
    mask.check(batch, num_queries, num_keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q_BTNK, k_BSZK, v_BSZU, sinks_N, mask, back_end, scale, softcap) -> tuple[jax.Array, jax.Array]:
    return back_end.forward(q_BTNK, k_BSZK, v_BSZU, sinks_N, mask, scale=scale, softcap=softcap)


def _attend_fwd(q_BTNK, k_BSZK, v_BSZU, sinks_N, mask, back_end, scale, softcap):
    out_BTNU, lse_BTN = back_end.forward(q_BTNK, k_BSZK, v_BSZU, sinks_N, mask, scale=scale, softcap=softcap)
    out_BTNU, lse_BTN = map(checkpoint_name, (out_BTNU, lse_BTN), SAVED_NAMES)
    return (out_BTNU, lse_BTN), (q_BTNK, k_BSZK, v_BSZU, sinks_N, mask, out_BTNU, lse_BTN)


def _attend_bwd(back_end, scale, softcap, residuals, cotangents):
    q_BTNK, k_BSZK, v_BSZU, sinks_N, mask, out_BTNU, lse_BTN = residuals
    dout_BTNU, dlse_BTN = cotangents
    # ds = p (dp - rowsum(p dp) + dlse), and rowsum(p dp) = rowsum(out dout); where lse is -inf there is nothing to pass on.
    delta_BTN = jnp.sum(out_BTNU.astype(lse_BTN.dtype) * dout_BTNU, axis=-1)
    delta_BTN -= jnp.where(lse_BTN == -jnp.inf, 0, dlse_BTN)
    dq_BTNK, dk_BSZK, dv_BSZU = back_end.backward(
        q_BTNK, k_BSZK, v_BSZU, mask, lse_BTN, dout_BTNU, delta_BTN, scale=scale, softcap=softcap
    )
    dsinks_N = None
    if sinks_N is not None:  # each is the logit of a key with dp = 0
        p_BTN = jnp.where(lse_BTN == -jnp.inf, 0, jnp.exp(sinks_N.astype(lse_BTN.dtype) - lse_BTN))
        dsinks_N = -jnp.sum(p_BTN * delta_BTN, axis=(0, 1)).astype(sinks_N.dtype)
    return dq_BTNK, dk_BSZK, dv_BSZU, dsinks_N, None


_attend.defvjp(_attend_fwd, _attend_bwd)
