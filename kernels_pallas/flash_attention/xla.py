"""Attention in plain JAX, by blocks of queries; the backward pass recomputes the probabilities from the saved logsumexp.

Blocks whose keys are a static prefix (causal by index) read that prefix only. At most `SEGMENTS` prefixes are unrolled, so
that the program does not grow with the length; the blocks of one segment run in a scan.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

BLOCK = 256  # queries at a time, once there are more than twice as many
SEGMENTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masks:
    """What a query may see. Segments None: everything is one document. Positions None: causal by index, or not causal."""

    causal: bool
    q_segment_ids_BT: jax.Array | None = None
    kv_segment_ids_BS: jax.Array | None = None
    q_positions_BT: jax.Array | None = None
    kv_positions_BS: jax.Array | None = None
    mask_BTS: jax.Array | None = None


jax.tree_util.register_dataclass(
    Masks,
    data_fields=["q_segment_ids_BT", "kv_segment_ids_BS", "q_positions_BT", "kv_positions_BS", "mask_BTS"],
    meta_fields=["causal"],
)


def forward(
    q_BTNK: jax.Array, k_BSZK: jax.Array, v_BSZU: jax.Array, masks: Masks, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, U] and the logsumexp [B, Z, G, T] (0 where a query sees nothing)."""
    q_BZGTK, k_BZSK, v_BZSU = _split_heads(q_BTNK, k_BSZK), k_BSZK.swapaxes(1, 2), v_BSZU.swapaxes(1, 2)
    plan = _Plan.of(q_BTNK.shape[1], k_BSZK.shape[1], masks)
    outs, lses = [], []
    for segment in plan.segments():
        k, v = k_BZSK[:, :, : segment.keys], v_BZSU[:, :, : segment.keys]

        def one_block(block, k=k, v=v, segment=segment):
            q_BZGtK, start = block
            s_BZGtS = _logits(q_BZGtK, k, scale)
            s_BZGtS = jnp.where(_visible(masks, plan, start, segment.keys), s_BZGtS, -jnp.inf)
            m_BZGt = jnp.max(s_BZGtS, axis=-1)
            m_BZGt = jnp.where(m_BZGt == -jnp.inf, 0, m_BZGt)
            p_BZGtS = jnp.exp(s_BZGtS - m_BZGt[..., None])
            l_BZGt = jnp.sum(p_BZGtS, axis=-1)
            l_BZGt = jnp.where(l_BZGt == 0, 1, l_BZGt)
            o_BZGtU = _dot(p_BZGtS.astype(v.dtype), v, 4, 2) / l_BZGt[..., None]
            return o_BZGtU.astype(q_BTNK.dtype), m_BZGt + jnp.log(l_BZGt)

        out, lse = segment.map(one_block, plan, q_BZGTK)
        outs.append(out)
        lses.append(lse)
    num_queries = q_BTNK.shape[1]
    out_BZGTU = jnp.concatenate(outs, axis=3)[:, :, :, :num_queries]
    return _merge_heads(out_BZGTU), jnp.concatenate(lses, axis=3)[:, :, :, :num_queries]


def backward(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    masks: Masks,
    scale: float,
    out_BTNU: jax.Array,
    lse_BZGT: jax.Array,
    dout_BTNU: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v."""
    q_BZGTK, k_BZSK, v_BZSU = _split_heads(q_BTNK, k_BSZK), k_BSZK.swapaxes(1, 2), v_BSZU.swapaxes(1, 2)
    dout_BZGTU = _split_heads(dout_BTNU, k_BSZK)
    delta_BTN = jnp.sum(out_BTNU.astype(jnp.float32) * dout_BTNU, axis=-1)
    delta_BZGT = _split_heads(delta_BTN[..., None], k_BSZK)[..., 0]
    plan = _Plan.of(q_BTNK.shape[1], k_BSZK.shape[1], masks)
    # dk and dv are kept transposed: q^T ds then needs no transpose of ds, which is far larger than q.
    batch, kv_heads, num_keys, width = k_BZSK.shape
    dk_BZKS = jnp.zeros((batch, kv_heads, width, num_keys), jnp.float32)
    dv_BZUS = jnp.zeros((batch, kv_heads, v_BZSU.shape[3], num_keys), jnp.float32)
    dqs = []
    for segment in plan.segments():
        k, v = k_BZSK[:, :, : segment.keys], v_BZSU[:, :, : segment.keys]

        def one_block(block, k=k, v=v, segment=segment):
            q_BZGtK, dout_BZGtU, lse_BZGt, delta_BZGt, start = block
            s_BZGtS = _logits(q_BZGtK, k, scale)
            visible = _visible(masks, plan, start, segment.keys)
            p_BZGtS = jnp.exp(jnp.where(visible, s_BZGtS - lse_BZGt[..., None], -jnp.inf))
            dp_BZGtS = _dot(dout_BZGtU, v, 4, 3)
            ds_BZGtS = (p_BZGtS * (dp_BZGtS - delta_BZGt[..., None]) * scale).astype(k.dtype)
            dq_BZGtK = _dot(ds_BZGtS, k, 4, 2)
            return (
                dq_BZGtK.astype(q_BTNK.dtype),
                _sum_over_queries(q_BZGtK, ds_BZGtS),
                _sum_over_queries(dout_BZGtU, p_BZGtS.astype(v.dtype)),
            )

        dq, dk, dv = segment.map_and_sum(one_block, plan, q_BZGTK, dout_BZGTU, lse_BZGT, delta_BZGT)
        dqs.append(dq)
        dk_BZKS = dk_BZKS.at[:, :, :, : segment.keys].add(dk)
        dv_BZUS = dv_BZUS.at[:, :, :, : segment.keys].add(dv)
    dq_BTNK = _merge_heads(jnp.concatenate(dqs, axis=3)[:, :, :, : q_BTNK.shape[1]])
    dk_BSZK, dv_BSZU = dk_BZKS.transpose(0, 3, 1, 2), dv_BZUS.transpose(0, 3, 1, 2)
    return dq_BTNK, dk_BSZK.astype(k_BSZK.dtype), dv_BSZU.astype(v_BSZU.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Segment:
    """Query blocks [first, first + blocks) that read keys [0, keys)."""

    first: int
    blocks: int
    keys: int

    def map(self, one_block, plan: "_Plan", *queries):
        if self.blocks == 1:
            return one_block(self._block(plan, queries, self.first * plan.block))
        starts = (self.first + jnp.arange(self.blocks, dtype=jnp.int32)) * plan.block
        outs = jax.lax.map(lambda start: one_block(self._block(plan, queries, start)), starts)
        return jax.tree.map(_join_blocks, outs)

    def map_and_sum(self, one_block, plan: "_Plan", *queries):
        """Like map for the first result; the other two are summed."""
        if self.blocks == 1:
            return one_block(self._block(plan, queries, self.first * plan.block))
        starts = (self.first + jnp.arange(self.blocks, dtype=jnp.int32)) * plan.block

        def step(sums, start):
            first, *others = one_block(self._block(plan, queries, start))
            return [a + b for a, b in zip(sums, others, strict=True)], first

        shapes = jax.eval_shape(lambda: one_block(self._block(plan, queries, 0))[1:])
        # Zeros made from an argument: inside shard_map the carry must vary over the axes that the arguments vary over.
        zero = queries[0].ravel()[0].astype(jnp.float32) * 0
        sums, first = jax.lax.scan(step, [jnp.broadcast_to(zero, s.shape) for s in shapes], starts)
        return _join_blocks(first), *sums

    def _block(self, plan: "_Plan", queries, start):
        return *(plan.slice_queries(a, start, axis=3) for a in queries), start


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """How T queries are cut: `num_blocks` blocks of `block` queries (the last padded), in segments of equal key range."""

    num_queries: int
    num_keys: int
    block: int
    num_blocks: int
    prefix: bool

    @classmethod
    def of(cls, num_queries: int, num_keys: int, masks: Masks) -> "_Plan":
        num_blocks = 1 if num_queries <= 2 * BLOCK else math.ceil(num_queries / BLOCK)
        block = num_queries if num_blocks == 1 else 8 * math.ceil(num_queries / num_blocks / 8)
        return cls(
            num_queries=num_queries,
            num_keys=num_keys,
            block=block,
            num_blocks=num_blocks,
            prefix=masks.causal and masks.q_positions_BT is None,
        )

    def segments(self) -> Iterator[_Segment]:
        per_segment = math.ceil(self.num_blocks / SEGMENTS) if self.prefix else self.num_blocks
        for first in range(0, self.num_blocks, per_segment):
            blocks = min(per_segment, self.num_blocks - first)
            keys = min(self.num_keys, (first + blocks) * self.block) if self.prefix else self.num_keys
            yield _Segment(first=first, blocks=blocks, keys=keys)

    def slice_queries(self, a: jax.Array, start, axis: int) -> jax.Array:
        """Queries [start, start + block) along an axis, zeros (segment 0) beyond the last."""
        missing = self.num_blocks * self.block - self.num_queries
        if missing:
            a = jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)])
        return jax.lax.dynamic_slice_in_dim(a, start, self.block, axis)


def _visible(masks: Masks, plan: _Plan, start, num_keys: int) -> jax.Array:
    """[B or 1, 1, 1, t, s]: which of the first `num_keys` keys each query of the block sees."""
    visible = jnp.ones((1, plan.block, num_keys), bool)
    if masks.causal:
        if masks.q_positions_BT is None or masks.kv_positions_BS is None:
            q_Bt, kv_Bs = (start + jnp.arange(plan.block))[None], jnp.arange(num_keys)[None]
        else:
            q_Bt, kv_Bs = plan.slice_queries(masks.q_positions_BT, start, 1), masks.kv_positions_BS[:, :num_keys]
        visible &= kv_Bs[:, None, :] <= q_Bt[:, :, None]
    if masks.q_segment_ids_BT is not None and masks.kv_segment_ids_BS is not None:
        q_Bt, kv_Bs = plan.slice_queries(masks.q_segment_ids_BT, start, 1), masks.kv_segment_ids_BS[:, :num_keys]
        visible &= (q_Bt[:, :, None] == kv_Bs[:, None, :]) & (q_Bt != 0)[:, :, None]
    if masks.mask_BTS is not None:
        visible &= plan.slice_queries(masks.mask_BTS, start, 1)[:, :, :num_keys]
    return visible[:, None, None]


def _logits(q_BZGtK: jax.Array, k_BZSK: jax.Array, scale: float) -> jax.Array:
    return _dot(q_BZGtK, k_BZSK, 4, 3) * scale


def _dot(a_BZGtx: jax.Array, b_BZyw: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contracts the last axis of queries with an axis of keys or values; the result keeps [B, Z, G, t, …]."""
    dims = (((a_axis,), (b_axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a_BZGtx, b_BZyw, dims, preferred_element_type=jnp.float32)


def _sum_over_queries(a_BZGtK: jax.Array, p_BZGtS: jax.Array) -> jax.Array:
    """aᵀ p, summed over the queries and heads of a group: [B, Z, K, S]."""
    batch, kv_heads, groups, block, width = a_BZGtK.shape
    a_BZKx = a_BZGtK.reshape(batch, kv_heads, groups * block, width).swapaxes(2, 3)
    p_BZxS = p_BZGtS.reshape(batch, kv_heads, groups * block, p_BZGtS.shape[-1])
    return jnp.matmul(a_BZKx, p_BZxS, preferred_element_type=jnp.float32)


def _split_heads(a_BTNK: jax.Array, k_BSZK: jax.Array) -> jax.Array:
    batch, length, heads, width = a_BTNK.shape
    kv_heads = k_BSZK.shape[2]
    return a_BTNK.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _merge_heads(a_BZGTK: jax.Array) -> jax.Array:
    batch, kv_heads, groups, length, width = a_BZGTK.shape
    return a_BZGTK.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, width)


def _join_blocks(a: jax.Array) -> jax.Array:
    """[blocks, B, Z, G, t, …] → [B, Z, G, blocks·t, …]."""
    a = jnp.moveaxis(a, 0, 3)
    return a.reshape(*a.shape[:3], a.shape[3] * a.shape[4], *a.shape[5:])
