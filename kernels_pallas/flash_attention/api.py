"""The public attention op."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention import reference, xla
from kernels_pallas.select import select


def flash_attention(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    mask_BTS: jax.Array | None = None,
    implementation: Literal["reference", "xla"] | None = None,
) -> jax.Array:
    """softmax(scale · q kᵀ + mask) v with grouped heads (Z divides N); returns [B, T, N, U] in q's dtype.

    A query sees the keys of its own segment (0 = padding, sees nothing and is seen by nothing) and, when causal, those at a
    position no later than its own. Without positions the index counts as the position, which for packed rows is the same
    within a segment, and the keys after a query's block are never read. Where mask_BTS, bool, is False it does not see the
    key either. A query that sees nothing gives zeros. Float32 softmax and accumulation. Differentiable in q, k and v.

    Raises ValueError on shapes that do not fit, and Unsupported on an implementation that is not there.
    """
    batch, num_queries, heads, width = q_BTNK.shape
    num_keys, kv_heads = k_BSZK.shape[1:3]
    if k_BSZK.shape != (batch, num_keys, kv_heads, width) or v_BSZU.shape[:3] != (batch, num_keys, kv_heads):
        raise ValueError(
            f"flash_attention: shapes do not fit: q {q_BTNK.shape}, k {k_BSZK.shape}, v {v_BSZU.shape} "
            "(need [B, T, N, K], [B, S, Z, K], [B, S, Z, U])"
        )
    if heads % kv_heads:
        raise ValueError(f"flash_attention: {heads} query heads are not a multiple of {kv_heads} key heads")
    if (q_segment_ids_BT is None) != (kv_segment_ids_BS is None):
        raise ValueError("flash_attention: give segment ids of both queries and keys, or of neither")
    if (q_positions_BT is None) != (kv_positions_BS is None):
        raise ValueError("flash_attention: give positions of both queries and keys, or of neither")
    if causal and q_positions_BT is None and num_queries != num_keys:
        raise ValueError(
            f"flash_attention: causal with {num_queries} queries and {num_keys} keys needs q_positions and kv_positions"
        )
    for name, ids, length in (
        ("q_segment_ids", q_segment_ids_BT, num_queries),
        ("kv_segment_ids", kv_segment_ids_BS, num_keys),
        ("q_positions", q_positions_BT, num_queries),
        ("kv_positions", kv_positions_BS, num_keys),
    ):
        if ids is not None and ids.shape != (batch, length):
            raise ValueError(f"flash_attention: {name} must be [{batch}, {length}], got {ids.shape}")
    if mask_BTS is not None and (mask_BTS.shape != (batch, num_queries, num_keys) or mask_BTS.dtype != bool):
        raise ValueError(
            f"flash_attention: mask must be bool [{batch}, {num_queries}, {num_keys}], got {mask_BTS.dtype} {mask_BTS.shape}"
        )
    table: dict[str, Callable] = {"xla": _xla, "reference": _run_reference}
    run = select("flash_attention", implementation, table)
    masks = xla.Masks(
        causal=causal,
        q_segment_ids_BT=q_segment_ids_BT,
        kv_segment_ids_BS=kv_segment_ids_BS,
        q_positions_BT=q_positions_BT if causal else None,
        kv_positions_BS=kv_positions_BS if causal else None,
        mask_BTS=mask_BTS,
    )
    return run(q_BTNK, k_BSZK, v_BSZU, masks, scale).astype(q_BTNK.dtype)


def _run_reference(q_BTNK, k_BSZK, v_BSZU, masks: xla.Masks, scale):
    def or_else(ids, default_1X, like):
        return jnp.broadcast_to(default_1X, like.shape[:2]) if ids is None else ids

    index_1T, index_1S = jnp.arange(q_BTNK.shape[1])[None], jnp.arange(k_BSZK.shape[1])[None]
    return reference.flash_attention(
        q_BTNK,
        k_BSZK,
        v_BSZU,
        scale=scale,
        causal=masks.causal,
        q_segment_ids_BT=or_else(masks.q_segment_ids_BT, jnp.ones_like(index_1T), q_BTNK),
        kv_segment_ids_BS=or_else(masks.kv_segment_ids_BS, jnp.ones_like(index_1S), k_BSZK),
        q_positions_BT=or_else(masks.q_positions_BT, index_1T, q_BTNK),
        kv_positions_BS=or_else(masks.kv_positions_BS, index_1S, k_BSZK),
        mask_BTS=masks.mask_BTS,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _xla(q_BTNK, k_BSZK, v_BSZU, masks: xla.Masks, scale):
    return xla.forward(q_BTNK, k_BSZK, v_BSZU, masks, scale)[0]


def _xla_fwd(q_BTNK, k_BSZK, v_BSZU, masks, scale):
    out_BTNU, lse_BZGT = xla.forward(q_BTNK, k_BSZK, v_BSZU, masks, scale)
    return out_BTNU, (q_BTNK, k_BSZK, v_BSZU, masks, out_BTNU, lse_BZGT)


def _xla_bwd(scale, residuals, dout_BTNU):
    q_BTNK, k_BSZK, v_BSZU, masks, out_BTNU, lse_BZGT = residuals
    return *xla.backward(q_BTNK, k_BSZK, v_BSZU, masks, scale, out_BTNU, lse_BZGT, dout_BTNU), None


_xla.defvjp(_xla_fwd, _xla_bwd)
