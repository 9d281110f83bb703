"""Attention over selected keys in plain JAX: chunk by chunk of queries their keys are gathered, [chunk, W, K], and multiplied.

The backward pass gathers them again, recomputes the probabilities, and adds the gradients of keys and values where they belong.
The rows of a batch are taken as one list of M queries over one list of R keys, a key head at a time.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.select import platform

# Numbers that are gathered at a time. On CPU they stay in the cache: one query's, at 512 keys of 576 numbers.
GATHERED, CPU_GATHERED = 1 << 26, 1 << 19


def forward(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array | None,
    index_BTW: jax.Array,
    *,
    scale: float,
    value_width: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, U] in q's dtype and the logsumexp [B, T, N]."""
    index_MW = in_one_list(index_BTW, k_BSZK.shape[1])
    dtype = jnp.promote_types(q_BTNK.dtype, jnp.float32)

    def one_head(head: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        q_MGK, k_RK, v_RU = head

        def one_chunk(queries: tuple[jax.Array, jax.Array], _: tuple) -> tuple[tuple[jax.Array, jax.Array], tuple]:
            q_mGK, index_mW = queries
            named_mW1, (k_mWK, v_mWU) = _gathered(index_mW, k_RK, v_RU)
            some_m11 = jnp.any(named_mW1, axis=1, keepdims=True)
            s_mWG = jnp.where(named_mW1, scale * _dot(k_mWK, q_mGK, 2, 2), -jnp.inf)
            m_m1G = jnp.where(some_m11, jnp.max(s_mWG, axis=1, keepdims=True), 0)
            p_mWG = jnp.exp(s_mWG - m_m1G)
            l_m1G = jnp.where(some_m11, jnp.sum(p_mWG, axis=1, keepdims=True), 1)
            o_mGU = _dot(p_mWG.astype(k_RK.dtype), v_mWU, 1, 1)[..., :value_width] / jnp.swapaxes(l_m1G, 1, 2)
            lse_mG = jnp.where(some_m11, m_m1G + jnp.log(l_m1G), -jnp.inf)[:, 0]
            return (jnp.where(some_m11, o_mGU, 0).astype(q_mGK.dtype), lse_mG), ()

        return over_chunks(one_chunk, (q_MGK, index_MW), (), k_RK.shape[1])[0]

    heads = (_heads_first(q_BTNK, k_BSZK), _keys_first(k_BSZK), _keys_first(v_BSZU))
    out_ZMGU, lse_ZMG = jax.lax.map(one_head, heads)
    return _heads_last(out_ZMGU, q_BTNK), _heads_last(lse_ZMG, q_BTNK).astype(dtype)


def backward(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array | None,
    index_BTW: jax.Array,
    lse_BTN: jax.Array,
    dout_BTNU: jax.Array,
    delta_BTN: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Gradients of q, k and v from those of the logits, ds = p (dp - delta)."""
    index_MW = in_one_list(index_BTW, k_BSZK.shape[1])
    dtype = lse_BTN.dtype

    def one_head(head: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        q_MGK, dout_MGU, lse_MG, delta_MG, k_RK, v_RU = head

        def one_chunk(queries: tuple[jax.Array, ...], sums: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple]:
            q_mGK, dout_mGU, lse_mG, delta_mG, index_mW = queries
            named_mW1, (k_mWK, v_mWU) = _gathered(index_mW, k_RK, v_RU)
            if v_RU is None:  # keys are values, of which the columns behind U have no weight: one product with both
                dout_mGU = jnp.pad(dout_mGU, ((0, 0), (0, 0), (0, k_RK.shape[1] - dout_mGU.shape[2])))
                both_mXK = jnp.concatenate([q_mGK, dout_mGU], axis=1)
                s_mWG, dp_mWG = jnp.split(_dot(k_mWK, both_mXK, 2, 2), 2, axis=2)
            else:
                s_mWG, dp_mWG = _dot(k_mWK, q_mGK, 2, 2), _dot(v_mWU, dout_mGU, 2, 2)
            p_mWG = jnp.where(named_mW1, jnp.exp(scale * s_mWG - lse_mG[:, None]), 0)
            ds_mWG = jnp.where(named_mW1, p_mWG * (dp_mWG - delta_mG[:, None]) * scale, 0)
            p_mWG, ds_mWG = p_mWG.astype(k_RK.dtype), ds_mWG.astype(k_RK.dtype)
            dq_mGK = jnp.where(jnp.any(named_mW1, axis=1, keepdims=True), _dot(ds_mWG, k_mWK, 1, 1), 0)
            if v_RU is None:
                parts = (_dot(jnp.concatenate([ds_mWG, p_mWG], axis=2), both_mXK, 2, 1),)
            else:
                parts = (_dot(ds_mWG, q_mGK, 2, 1), _dot(p_mWG, dout_mGU, 2, 1))
            return dq_mGK.astype(q_mGK.dtype), tuple(_added(*each, index_mW) for each in zip(sums, parts, strict=True))

        sums = tuple(_zeros_like(a, dtype) for a in (k_RK, v_RU) if a is not None)
        queries = (q_MGK, dout_MGU, lse_MG, delta_MG, index_MW)
        dq_MGK, sums = over_chunks(one_chunk, queries, sums, k_RK.shape[1])
        return dq_MGK, *(a.astype(q_BTNK.dtype) for a in sums)

    heads = tuple(_heads_first(a, k_BSZK) for a in (q_BTNK, dout_BTNU, lse_BTN, delta_BTN))
    dq_ZMGK, *sums = jax.lax.map(one_head, (*heads, _keys_first(k_BSZK), _keys_first(v_BSZU)))
    dk_BSZK, dv_BSZU, *_ = *(jnp.moveaxis(a, 0, 1).reshape(*k_BSZK.shape[:3], -1) for a in sums), None
    return _heads_last(dq_ZMGK, q_BTNK), dk_BSZK, dv_BSZU


def in_one_list(index_BTW: jax.Array, num_keys: int) -> jax.Array:
    """Indices [M, W] into the keys of all rows; what names no key is beyond the last."""
    batch = index_BTW.shape[0]
    index_BTW = index_BTW.astype(jnp.int32)
    first_B11 = num_keys * jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    named_BTW = (index_BTW >= 0) & (index_BTW < num_keys)
    return jnp.where(named_BTW, first_B11 + index_BTW, batch * num_keys).reshape(-1, index_BTW.shape[2])


def _gathered(index_mW: jax.Array, k_RK: jax.Array, v_RU: jax.Array | None) -> tuple[jax.Array, list[jax.Array]]:
    """Which slots name a key, [m, W, 1]; keys and values, in other slots one that the query names, so that no NaN is read."""
    named_mW = index_mW < k_RK.shape[0]
    other_m1 = jnp.minimum(jnp.min(index_mW, axis=1, keepdims=True), k_RK.shape[0] - 1)
    index_mW = jnp.where(named_mW, index_mW, other_m1)
    k_mWK = k_RK.at[index_mW].get(mode="promise_in_bounds", wrap_negative_indices=False)
    if v_RU is None:
        return named_mW[..., None], [k_mWK, k_mWK]
    return named_mW[..., None], [k_mWK, v_RU.at[index_mW].get(mode="promise_in_bounds", wrap_negative_indices=False)]


def _added(sum_RK: jax.Array, part_mWK: jax.Array, index_mW: jax.Array) -> jax.Array:
    """With each part added to the key that its slot names."""
    part_XK = part_mWK.reshape(-1, part_mWK.shape[2])
    return sum_RK.at[index_mW.reshape(-1)].add(part_XK, mode="drop", wrap_negative_indices=False)


def over_chunks(one_chunk: Callable, queries: Any, carry: Any, width: int) -> tuple[Any, Any]:
    """one_chunk(some of the queries, carry) -> (results, carry) for all; the results of all queries, and the last carry."""
    num_queries, slots = queries[-1].shape
    most = max(1, (CPU_GATHERED if platform() == "cpu" else GATHERED) // (slots * width))
    if num_queries <= most:
        return one_chunk(queries, carry)
    chunk = 1 << (most.bit_length() - 1)  # sequences are multiples of such numbers, and need no padding
    chunks = math.ceil(num_queries / chunk)

    def split(a: jax.Array, **how: Any) -> jax.Array:
        missing = chunks * chunk - num_queries
        a = jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1), **how) if missing else a
        return a.reshape(chunks, chunk, *a.shape[1:])

    *others, index_MW = queries  # what pads names no key
    xs = (*(split(a) for a in others), split(index_MW, constant_values=jnp.iinfo(index_MW.dtype).max))
    carry, results = jax.lax.scan(lambda carry, x: one_chunk(x, carry)[::-1], carry, xs)
    return jax.tree.map(lambda a: a.reshape(chunks * chunk, *a.shape[2:])[:num_queries], results), carry


def _dot(a_mxy: jax.Array, b_mxy: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    dims = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a_mxy, b_mxy, dims, preferred_element_type=jnp.promote_types(a_mxy.dtype, jnp.float32))


def _zeros_like(a: jax.Array, dtype: Any) -> jax.Array:
    """Inside shard_map what a loop carries must vary over the axes that its results vary over."""
    axes = tuple(jax.typeof(a).manual_axis_type.varying)
    zeros = jnp.zeros(a.shape, dtype)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def _heads_first(a_BTNK: jax.Array, k_BSZK: jax.Array) -> jax.Array:
    """[Z, M, G, …] of [B, T, N, …]."""
    batch, length, heads = a_BTNK.shape[:3]
    kv_heads = k_BSZK.shape[2]
    return jnp.moveaxis(a_BTNK.reshape(batch * length, kv_heads, heads // kv_heads, *a_BTNK.shape[3:]), 1, 0)


def _keys_first(k_BSZK: jax.Array | None) -> jax.Array | None:
    """[Z, R, K] of [B, S, Z, K]."""
    return None if k_BSZK is None else jnp.moveaxis(k_BSZK.reshape(-1, *k_BSZK.shape[2:]), 1, 0)


def _heads_last(a_ZMGK: jax.Array, q_BTNK: jax.Array) -> jax.Array:
    """[B, T, N, …] of [Z, M, G, …]."""
    return jnp.moveaxis(a_ZMGK, 0, 1).reshape(*q_BTNK.shape[:3], *a_ZMGK.shape[3:])
