"""Attention in plain JAX by tiles, a block of queries by a chunk of keys; the backward pass recomputes the probabilities.

A running softmax (arXiv 2112.05682) joins the chunks, so memory grows with T and S and never with T·S. A loop over blocks holds a
loop over chunks, from the first to the last that one of the block's queries can see: static where indices decide, else narrowed
by positions and segment ids while running. One block alone takes its keys in one piece.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.select import platform

BLOCK = 256  # queries at a time
CHUNKS = (256, 1024)  # least and most keys at a time for a whole block, more for fewer queries
TILE, CPU_TILE = (
    1 << 26,
    1 << 20,
)  # scores at a time over all heads, if chunks may be so small; on CPU they stay in the cache
WHOLE = 4  # one block alone takes its keys in one piece if they are not more than so many chunks


def forward(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    sinks_N: jax.Array | None,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, U] in q's dtype and the logsumexp [B, T, N]."""
    plan = _Plan.of(q_BTNK.shape, k_BSZK.shape[1], mask)
    q_BZGTK = plan.pad_queries(_heads_first(q_BTNK, k_BSZK), axis=3)
    k_BZSK, v_BZSU = (plan.pad_keys(a.swapaxes(1, 2), axis=2) for a in (k_BSZK, v_BSZU))
    batch, kv_heads, groups, _, _ = q_BZGTK.shape
    dtype = jnp.promote_types(q_BTNK.dtype, jnp.float32)

    def one_block(i: Any) -> tuple[jax.Array, jax.Array]:
        q_BZGtK = plan.block_of(q_BZGTK, i, axis=3)

        def absorb(start: Any, size: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            m_BZGt, l_BZGt, o_BZGtU = state
            k_BZsK, v_BZsU = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=2) for a in (k_BZSK, v_BZSU))
            s_BZGts = plan.hide(_logits(q_BZGtK, k_BZsK, scale, softcap), i, start)
            new_m_BZGt = jnp.maximum(m_BZGt, jnp.max(s_BZGts, axis=-1))
            finite_m_BZGt = jnp.where(new_m_BZGt == -jnp.inf, 0, new_m_BZGt)
            p_BZGts = jnp.exp(s_BZGts - finite_m_BZGt[..., None])
            kept_BZGt = jnp.exp(m_BZGt - finite_m_BZGt)
            l_BZGt = l_BZGt * kept_BZGt + jnp.sum(p_BZGts, axis=-1)
            o_BZGtU = o_BZGtU * kept_BZGt[..., None] + _dot(p_BZGts.astype(v_BZsU.dtype), v_BZsU, 4, 2)
            return new_m_BZGt, l_BZGt, o_BZGtU

        rows = (batch, kv_heads, groups, plan.block)
        m_BZGt, l_BZGt = _full(rows, -jnp.inf, dtype, q_BTNK), _full(rows, 0, dtype, q_BTNK)
        if sinks_N is not None:
            m_BZGt = jnp.broadcast_to(sinks_N.astype(dtype).reshape(1, kv_heads, groups, 1), rows)
            l_BZGt = jnp.where(m_BZGt == -jnp.inf, 0, 1.0).astype(dtype)
        o_BZGtU = _full((*rows, v_BSZU.shape[-1]), 0, dtype, q_BTNK)
        m_BZGt, l_BZGt, o_BZGtU = plan.over_keys(i, absorb, (m_BZGt, l_BZGt, o_BZGtU))
        some_BZGt = l_BZGt > 0
        l_BZGt = jnp.where(some_BZGt, l_BZGt, 1)
        lse_BZGt = jnp.where(some_BZGt, m_BZGt + jnp.log(l_BZGt), -jnp.inf)
        return (o_BZGtU / l_BZGt[..., None]).astype(q_BTNK.dtype), lse_BZGt

    (out_BZGTU, lse_BZGT), _ = plan.over_queries(lambda i, _: (one_block(i), ()), ())
    return _heads_last(out_BZGTU), _heads_last(lse_BZGT)


def backward(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    mask: Mask,
    lse_BTN: jax.Array,
    dout_BTNU: jax.Array,
    delta_BTN: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from those of the logits, ds = p (dp - delta)."""
    plan = _Plan.of(q_BTNK.shape, k_BSZK.shape[1], mask)
    q_BZGTK, dout_BZGTU, lse_BZGT, delta_BZGT = (
        plan.pad_queries(_heads_first(a, k_BSZK), axis=3) for a in (q_BTNK, dout_BTNU, lse_BTN, delta_BTN)
    )
    k_BZSK, v_BZSU = (plan.pad_keys(a.swapaxes(1, 2), axis=2) for a in (k_BSZK, v_BSZU))
    batch, kv_heads, num_keys, _ = k_BZSK.shape
    dtype = lse_BTN.dtype

    def one_block(i: Any, dk_dv: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        q_BZGtK, dout_BZGtU, lse_BZGt, delta_BZGt = (
            plan.block_of(a, i, axis=3) for a in (q_BZGTK, dout_BZGTU, lse_BZGT, delta_BZGT)
        )

        def absorb(start: Any, size: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq_BZGtK, dk_BZKS, dv_BZUS = state
            k_BZsK, v_BZsU = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=2) for a in (k_BZSK, v_BZSU))
            s_BZGts = _logits(q_BZGtK, k_BZsK, scale, softcap)
            p_BZGts = jnp.exp(plan.hide(s_BZGts - lse_BZGt[..., None], i, start))
            ds_BZGts = p_BZGts * (_dot(dout_BZGtU, v_BZsU, 4, 3) - delta_BZGt[..., None]) * scale
            if softcap is not None:
                ds_BZGts *= 1 - jnp.square(s_BZGts / softcap)
            ds_BZGts = ds_BZGts.astype(k_BZsK.dtype)
            return (
                dq_BZGtK + _dot(ds_BZGts, k_BZsK, 4, 2),
                _add_at(dk_BZKS, _sum_over_queries(q_BZGtK, ds_BZGts), start),
                _add_at(dv_BZUS, _sum_over_queries(dout_BZGtU, p_BZGts.astype(v_BZsU.dtype)), start),
            )

        dq_BZGtK = _full(q_BZGtK.shape, 0, dtype, q_BTNK)
        dq_BZGtK, *new_dk_dv = plan.over_keys(i, absorb, (dq_BZGtK, *dk_dv))
        return dq_BZGtK.astype(q_BTNK.dtype), tuple(new_dk_dv)

    # dk and dv are kept transposed: qᵀ ds then needs no transpose of ds, which is far larger than q.
    sums = tuple(_full((batch, kv_heads, a.shape[-1], num_keys), 0, dtype, q_BTNK) for a in (k_BSZK, v_BSZU))
    dq_BZGTK, (dk_BZKS, dv_BZUS) = plan.over_queries(one_block, sums)
    dk_BSZK, dv_BSZU = (a.transpose(0, 3, 1, 2)[:, : k_BSZK.shape[1]] for a in (dk_BZKS, dv_BZUS))
    return _heads_last(dq_BZGTK), dk_BSZK.astype(k_BSZK.dtype), dv_BSZU.astype(v_BSZU.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """T queries in `blocks` blocks, S keys in `chunks` chunks, the last of each padded, as the arrays of `mask` are."""

    num_queries: int
    num_keys: int
    block: int
    blocks: int
    chunk: int
    chunks: int
    whole: bool  # one block and one chunk, of which only the range that indices give is read
    mask: Mask

    @classmethod
    def of(cls, q_shape: tuple[int, ...], num_keys: int, mask: Mask) -> "_Plan":
        batch, num_queries, heads, _ = q_shape
        blocks = math.ceil(num_queries / BLOCK)
        block = num_queries if blocks == 1 else _even(num_queries, blocks)
        least, most = (size * max(1, BLOCK // block) for size in CHUNKS)
        tile = CPU_TILE if platform() == "cpu" else TILE
        most = min(max(least, tile // (batch * heads * block)), most)
        whole = blocks == 1 and num_keys <= WHOLE * most
        chunks = 1 if whole else math.ceil(num_keys / most)
        chunk = num_keys if whole else _even(num_keys, chunks)
        plan = cls(
            num_queries=num_queries,
            num_keys=num_keys,
            block=block,
            blocks=blocks,
            chunk=chunk,
            chunks=chunks,
            whole=whole,
            mask=mask,
        )
        return dataclasses.replace(plan, mask=plan._padded_mask())

    def _padded_mask(self) -> Mask:
        def padded(a: jax.Array | None, pad: Callable, **how: Any) -> jax.Array | None:
            return None if a is None else pad(a, 1, **how)

        mask, queries, keys = self.mask, self.pad_queries, self.pad_keys
        selected_BTS = padded(mask.selected_BTS, queries)
        return dataclasses.replace(
            mask,
            q_positions_BT=padded(mask.q_positions_BT, queries, mode="edge"),
            kv_positions_BS=padded(mask.kv_positions_BS, keys, mode="edge"),
            q_segment_ids_BT=padded(mask.q_segment_ids_BT, queries),
            kv_segment_ids_BS=padded(mask.kv_segment_ids_BS, keys),
            selected_BTS=None if selected_BTS is None else keys(selected_BTS, 2),
        )

    def pad_queries(self, a: jax.Array, axis: int, mode: str = "constant") -> jax.Array:
        return _pad(a, self.blocks * self.block, axis, mode)

    def pad_keys(self, a: jax.Array, axis: int, mode: str = "constant") -> jax.Array:
        return _pad(a, self.chunks * self.chunk, axis, mode)

    def block_of(self, a: jax.Array, i: Any, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a, i * self.block, self.block, axis)

    def over_queries(self, one_block: Callable, carry: Any) -> tuple[Any, Any]:
        """one_block(i, carry) -> (rows, carry) for every block; the rows of all, joined along axis 3, and the last carry."""
        if self.blocks == 1:
            return one_block(0, carry)
        numbers = jnp.arange(self.blocks, dtype=jnp.int32)
        carry, outs = jax.lax.scan(lambda carry, i: one_block(i, carry)[::-1], carry, numbers)
        joined = jax.tree.map(_join_blocks, outs)
        return jax.tree.map(lambda a: a[:, :, :, : self.num_queries], joined), carry

    def over_keys(self, i: Any, absorb: Callable, state: Any) -> Any:
        """absorb(start, size, state) -> state for all keys that block i sees, and some that it does not."""
        if self.whole:
            start, stop = self._key_range()
            return absorb(start, stop - start, state) if start < stop else state
        first, end = (jnp.asarray(chunks)[i] for chunks in self._chunk_range())
        return jax.lax.fori_loop(first, end, lambda c, state: absorb(c * self.chunk, self.chunk, state), state)

    def hide(self, s_BZGts: jax.Array, i: Any, start: Any) -> jax.Array:
        """-inf where a query of block i does not see a key; the first key is `start`."""
        mask, size, conditions = self.mask, s_BZGts.shape[-1], []

        def keys_of(a: jax.Array, axis: int = 1) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(a, start, size, axis)

        slots_1s = start + jnp.arange(size, dtype=jnp.int32)[None]
        if self.chunks * self.chunk > self.num_keys:
            conditions.append(slots_1s[:, None] < self.num_keys)
        if mask.ordered:
            if mask.q_positions_BT is None or mask.kv_positions_BS is None:
                q_Bt = (mask.q_offset or 0) + i * self.block + jnp.arange(self.block, dtype=jnp.int32)[None]
                kv_Bs = slots_1s
            else:
                q_Bt, kv_Bs = self.block_of(mask.q_positions_BT, i, 1), keys_of(mask.kv_positions_BS)
            distance_Bts = kv_Bs[:, None, :] - q_Bt[:, :, None]
            if mask.right is not None:
                conditions.append(distance_Bts <= mask.right)
            if mask.left is not None:
                conditions.append(distance_Bts >= -mask.left)
        if mask.q_segment_ids_BT is not None and mask.kv_segment_ids_BS is not None:
            q_Bt, kv_Bs = self.block_of(mask.q_segment_ids_BT, i, 1), keys_of(mask.kv_segment_ids_BS)
            conditions.append((q_Bt[:, :, None] == kv_Bs[:, None, :]) & (q_Bt != 0)[:, :, None])
        if mask.selected_BTS is not None:
            conditions.append(keys_of(self.block_of(mask.selected_BTS, i, 1), axis=2))
        if not conditions:
            return s_BZGts
        return jnp.where(functools.reduce(jnp.logical_and, conditions)[:, None, None], s_BZGts, -jnp.inf)

    def _key_range(self) -> tuple[int, int]:
        """The keys [start, stop) beyond which no query sees, as far as indices tell."""
        start, stop, mask = 0, self.num_keys, self.mask
        if mask.ordered and mask.q_positions_BT is None:
            first = mask.q_offset or 0
            start = start if mask.left is None else max(start, first - mask.left)
            stop = stop if mask.right is None else min(stop, first + self.num_queries + mask.right)
        return start, stop

    def _chunk_range(self) -> tuple[Any, Any]:
        """For each block the first chunk of keys with one that a query may see, and the end; NumPy if indices alone decide."""
        mask = self.mask
        seen_Bij: Any = np.ones((1, self.blocks, self.chunks), bool)
        if mask.ordered:
            if mask.q_positions_BT is None or mask.kv_positions_BS is None:
                q_Bi, kv_Bj = np.arange(self.blocks) * self.block, np.arange(self.chunks) * self.chunk
                q_Bi = q_Bi[None] + (mask.q_offset or 0)
                q, kv = (q_Bi, q_Bi + self.block - 1), (kv_Bj[None], kv_Bj[None] + self.chunk - 1)
            else:
                q, kv = _extremes(mask.q_positions_BT, self.block), _extremes(mask.kv_positions_BS, self.chunk)
            if mask.right is not None:
                seen_Bij = seen_Bij & (kv[0][:, None, :] <= q[1][:, :, None] + mask.right)
            if mask.left is not None:
                seen_Bij = seen_Bij & (kv[1][:, None, :] >= q[0][:, :, None] - mask.left)
        if mask.q_segment_ids_BT is not None and mask.kv_segment_ids_BS is not None:
            q = _extremes(mask.q_segment_ids_BT, self.block, leave_out=0)
            kv = _extremes(mask.kv_segment_ids_BS, self.chunk, leave_out=0)
            seen_Bij = seen_Bij & (kv[0][:, None, :] <= q[1][:, :, None]) & (kv[1][:, None, :] >= q[0][:, :, None])
        seen_ij = seen_Bij.any(0)
        some_i = seen_ij.any(1)
        return seen_ij.argmax(1) * some_i, (self.chunks - seen_ij[:, ::-1].argmax(1)) * some_i


def _extremes(ids_BT: jax.Array, size: int, leave_out: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Least and greatest of each `size` ids, [B, T / size]; the wrong way round where all are left out."""
    ids_Bis = ids_BT.reshape(ids_BT.shape[0], -1, size)
    if leave_out is None:
        return ids_Bis.min(-1), ids_Bis.max(-1)
    limits, counts = jnp.iinfo(ids_BT.dtype), ids_Bis != leave_out
    return jnp.where(counts, ids_Bis, limits.max).min(-1), jnp.where(counts, ids_Bis, limits.min).max(-1)


def _even(length: int, parts: int) -> int:
    """Size of `parts` equal parts that hold `length`, a multiple of 8."""
    return 8 * math.ceil(length / parts / 8)


def _pad(a: jax.Array, length: int, axis: int, mode: str = "constant") -> jax.Array:
    missing = length - a.shape[axis]
    return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)], mode) if missing else a


def _full(shape: tuple[int, ...], value: float, dtype: Any, like: jax.Array) -> jax.Array:
    """Inside shard_map what a loop carries must vary over the axes that its results vary over: those of any argument."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    full = jnp.full(shape, value, dtype)
    return jax.lax.pcast(full, axes, to="varying") if axes else full


def _logits(q_BZGtK: jax.Array, k_BZsK: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    s_BZGts = _dot(q_BZGtK, k_BZsK, 4, 3) * scale
    return s_BZGts if softcap is None else softcap * jnp.tanh(s_BZGts / softcap)


def _dot(a_BZGtx: jax.Array, b_BZyw: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contracts the last axis of queries with an axis of keys or values; the result keeps [B, Z, G, t, …]."""
    dims = (((a_axis,), (b_axis,)), ((0, 1), (0, 1)))
    dtype = jnp.promote_types(a_BZGtx.dtype, jnp.float32)
    return jax.lax.dot_general(a_BZGtx, b_BZyw, dims, preferred_element_type=dtype)


def _sum_over_queries(a_BZGtK: jax.Array, p_BZGts: jax.Array) -> jax.Array:
    """aᵀ p, summed over the queries and heads of a group: [B, Z, K, s]."""
    batch, kv_heads, groups, block, width = a_BZGtK.shape
    a_BZKx = a_BZGtK.reshape(batch, kv_heads, groups * block, width).swapaxes(2, 3)
    p_BZxs = p_BZGts.reshape(batch, kv_heads, groups * block, p_BZGts.shape[-1])
    return jnp.matmul(a_BZKx, p_BZxs, preferred_element_type=jnp.promote_types(a_BZGtK.dtype, jnp.float32))


def _add_at(sum_BZKS: jax.Array, part_BZKs: jax.Array, start: Any) -> jax.Array:
    """Adds a part to the keys from `start` on."""
    size = part_BZKs.shape[-1]
    if size == sum_BZKS.shape[-1]:
        return sum_BZKS + part_BZKs
    part_BZKs += jax.lax.dynamic_slice_in_dim(sum_BZKS, start, size, 3)
    return jax.lax.dynamic_update_slice_in_dim(sum_BZKS, part_BZKs, start, 3)


def _heads_first(a_BTNK: jax.Array, k_BSZK: jax.Array) -> jax.Array:
    """[B, Z, G, T, …] of [B, T, N, …]."""
    batch, length, heads = a_BTNK.shape[:3]
    kv_heads = k_BSZK.shape[2]
    return jnp.moveaxis(a_BTNK.reshape(batch, length, kv_heads, heads // kv_heads, *a_BTNK.shape[3:]), 1, 3)


def _heads_last(a_BZGTK: jax.Array) -> jax.Array:
    """[B, T, N, …] of [B, Z, G, T, …]."""
    batch, kv_heads, groups, length = a_BZGTK.shape[:4]
    return jnp.moveaxis(a_BZGTK, 3, 1).reshape(batch, length, kv_heads * groups, *a_BZGTK.shape[4:])


def _join_blocks(a: jax.Array) -> jax.Array:
    """[blocks, B, Z, G, t, …] → [B, Z, G, blocks·t, …]."""
    a = jnp.moveaxis(a, 0, 3)
    return a.reshape(*a.shape[:3], a.shape[3] * a.shape[4], *a.shape[5:])
