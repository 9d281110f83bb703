"""Attention as Mosaic TPU kernels: one forward, and backward one or two; the probabilities are recomputed.

The grid walks a list of tiles, a block of queries by a block of keys, with only those in which some query may see some key. What
indices decide, decides which are on the list; what positions and segment ids decide, which of these are passed over while running.

JAX's own splash attention is not behind this: it cannot run inside a `shard_map` that checks types, its fused backward pass keeps
a dq for each block of keys (memory T·S), it takes no positions and passes nothing over by segments.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.select import Unsupported

LANES = 128  # of a vector register
HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # a logit; not -inf, of which a difference is no number
PASS, PARTLY, WHOLLY = range(3)  # what is visible of a tile
SMEM_BYTES = 768 << 10  # for the list of tiles, of 1 MiB
VMEM_BYTES = 56 << 20  # of the 64 MiB that the chips with least have
WHOLE_DQ_BYTES = 16 << 20  # a dq of all queries may take so much of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    queries: int = 1024
    keys: int = 1024
    keys_at_once: int = 512  # of the scores that are in VMEM

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if min(sizes) < LANES or any(size % LANES for size in sizes) or self.keys % self.keys_at_once:
            raise ValueError(f"{self}: multiples of {LANES} are needed, and keys a multiple of keys_at_once")
        if self.queries * self.keys_at_once > 2**20:
            raise ValueError(f"{self}: more than 4 MiB of scores would not fit into every VMEM")

    @classmethod
    def of(cls, num_queries: int, num_keys: int, width: int) -> "Tile":
        """Large enough that a step costs little beside its products; smaller for wide heads, and so as to pad little."""
        most = 1024 if width <= 256 else 512
        keys = _even(num_keys, most)
        halves = keys > 512 and keys % (2 * LANES) == 0
        return cls(queries=_even(num_queries, most), keys=keys, keys_at_once=keys // 2 if halves else keys)


def forward(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    sinks_N: jax.Array | None,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    tile: Tile | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, U] in q's dtype and the logsumexp [B, T, N]."""
    plan = _Plan.of(q_BTNK, k_BSZK, v_BSZU, mask, tile)
    score = _Score(plan=plan, scale=scale, softcap=softcap, q_axis=0)
    ids, ids_specs = plan.ids(
        q_axis=0, q_at=lambda b, n, s, t: (b, t.outer(s)), kv_at=lambda b, n, s, t: (b, t.inner(b, s))
    )
    width, v_width = q_BTNK.shape[-1], v_BSZU.shape[-1]

    def kernel(outer_ref, code_ref, q_ref, k_ref, v_ref, sinks_ref, ids_ref, o_ref, lse_ref, m_ref, l_ref, acc_ref):
        at = _At(outer_ref, code_ref, plan)
        b, s = pl.program_id(0), pl.program_id(2)

        @pl.when(at.is_first(s))
        def _():
            if sinks_ref is None:
                m_ref[...] = jnp.full(m_ref.shape, HIDDEN, jnp.float32)
                l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
            else:
                m_ref[...] = jnp.broadcast_to(jnp.maximum(sinks_ref[...], HIDDEN), m_ref.shape)
                l_ref[...] = jnp.where(m_ref[...] > HIDDEN, 1.0, 0.0)
            acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

        def absorb(masked: bool) -> None:
            for keys in plan.chunks:
                logits = score(q_ref[...], k_ref[keys, :])
                if masked:
                    logits = score.hide(logits, ids_ref, at.outer(s), at.inner(b, s), keys)
                m = jnp.maximum(m_ref[...], jnp.max(logits, axis=1, keepdims=True))
                p = jnp.exp(logits - _lanes(m, logits.shape[1]))
                kept = jnp.exp(m_ref[...] - m)
                l_ref[...] = l_ref[...] * kept + jnp.sum(p, axis=1, keepdims=True)
                m_ref[...] = m
                acc_ref[...] = acc_ref[...] * _lanes(kept, v_width) + _dot(p.astype(v_ref.dtype), v_ref[keys, :], 1, 0)

        at.run(b, s, absorb)

        @pl.when(at.is_last(s))
        def _():
            some = m_ref[...] > HIDDEN / 2
            total = jnp.where(some, l_ref[...], 1.0)
            o_ref[...] = jnp.where(_lanes(some, v_width), acc_ref[...] / _lanes(total, v_width), 0).astype(o_ref.dtype)
            lse_ref[...] = jnp.where(some, m_ref[...] + jnp.log(total), -jnp.inf).T[:1]

    q_spec = plan.spec(plan.tile.queries, width, lambda b, n, s, t: (b, n, t.outer(s), 0))
    k_spec = plan.spec(plan.tile.keys, width, lambda b, n, s, t: (b, n // plan.group, t.inner(b, s), 0))
    v_spec = plan.spec(plan.tile.keys, v_width, lambda b, n, s, t: (b, n // plan.group, t.inner(b, s), 0))
    o_spec = plan.spec(plan.tile.queries, v_width, lambda b, n, s, t: (b, n, t.outer(s), 0))
    lse_spec = plan.spec(1, plan.tile.queries, lambda b, n, s, t: (b, n, 0, t.outer(s)))
    sinks_N1L = sinks_spec = None
    if sinks_N is not None:
        sinks_N1L = jnp.broadcast_to(sinks_N.astype(jnp.float32)[:, None, None], (plan.heads, 1, LANES))
        sinks_spec = pl.BlockSpec((None, 1, LANES), lambda b, n, s, *_: (n, 0, 0))
    rows = plan.tile.queries
    o_BNTU, lse_BN1T = plan.call(
        kernel,
        plan.tiles(by_queries=True),
        heads=plan.heads,
        in_specs=[q_spec, k_spec, v_spec, sinks_spec, ids_specs],
        out_specs=[o_spec, lse_spec],
        out_shape=[
            plan.result((plan.batch, plan.heads, plan.padded_queries, v_width), q_BTNK.dtype),
            plan.result((plan.batch, plan.heads, 1, plan.padded_queries), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, v_width)],
        products=(width, v_width),
        name="flash_attention_forward",
    )(plan.queries(q_BTNK), plan.keys(k_BSZK), plan.keys(v_BSZU), sinks_N1L, ids)
    return plan.heads_last(o_BNTU), plan.heads_last(lse_BN1T[:, :, 0])


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
    tile: Tile | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from those of the logits, ds = p (dp - delta)."""
    plan = _Plan.of(q_BTNK, k_BSZK, v_BSZU, mask, tile)
    # Where a query sees nothing, exp(s - lse) is then 0.
    lse_BN1T = plan.queries(jnp.where(lse_BTN == -jnp.inf, jnp.inf, lse_BTN), fill=jnp.inf)[:, :, None]
    delta_BN1T = plan.queries(delta_BTN)[:, :, None]
    args = plan.queries(q_BTNK), plan.keys(k_BSZK), plan.keys(v_BSZU), plan.queries(dout_BTNU), lse_BN1T, delta_BN1T
    fused = plan.group * plan.padded_queries * _ceil(q_BTNK.shape[-1], LANES) * 4 <= WHOLE_DQ_BYTES
    dq_BNTK, dk_BZSK, dv_BZSU = _keys_backward(plan, args, scale, softcap, with_dq=fused)
    if dq_BNTK is None:
        dq_BNTK = _queries_backward(plan, args, scale, softcap)
    dk_BSZK, dv_BSZU = (a.swapaxes(1, 2)[:, : plan.num_keys] for a in (dk_BZSK, dv_BZSU))
    return plan.heads_last(dq_BNTK).astype(q_BTNK.dtype), dk_BSZK, dv_BSZU


def _keys_backward(
    plan: "_Plan", args: tuple[jax.Array, ...], scale: float, softcap: float | None, with_dq: bool
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """dk and dv, a block of keys after the other, and if wanted dq of all queries of a group at once in VMEM."""
    q_BNTK, k_BZSK, v_BZSU = args[:3]
    width, v_width, group, rows = q_BNTK.shape[-1], v_BZSU.shape[-1], plan.group, plan.tile.queries
    score = _Score(plan=plan, scale=scale, softcap=softcap, q_axis=1)

    def q_index(b, z, s, g, t):
        return b, z * group + g, t.inner(b, s), 0

    def lse_index(b, z, s, g, t):
        return b, z * group + g, 0, t.inner(b, s)

    def k_index(b, z, s, g, t):
        return b, z, t.outer(s), 0

    ids, ids_specs = plan.ids(
        q_axis=1, q_at=lambda b, z, s, g, t: (b, t.inner(b, s)), kv_at=lambda b, z, s, g, t: (b, t.outer(s))
    )

    def kernel(
        outer_ref,
        code_ref,
        q_ref,
        k_ref,
        v_ref,
        do_ref,
        lse_ref,
        delta_ref,
        ids_ref,
        dq_ref,
        dk_ref,
        dv_ref,
        dk_acc,
        dv_acc,
    ):
        at = _At(outer_ref, code_ref, plan)
        b, s, g = pl.program_id(0), pl.program_id(2), pl.program_id(3)

        @pl.when(at.is_first(s) & (g == 0))
        def _():
            dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
            dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

        if dq_ref is not None:

            @pl.when((s == 0) & (g == 0))
            def _():
                dq_ref[...] = jnp.zeros(dq_ref.shape, jnp.float32)

        def absorb(masked: bool) -> None:
            for keys in plan.chunks:
                q, k, do = q_ref[...], k_ref[keys, :], do_ref[...]
                shown = logits = score(k, q)
                if masked:
                    shown = score.hide(logits, ids_ref, at.inner(b, s), at.outer(s), keys)
                p = jnp.exp(shown - lse_ref[...])
                dv_acc[keys, :] += _dot(p.astype(do.dtype), do, 1, 0)
                ds = p * (_dot(v_ref[keys, :], do, 1, 1) - delta_ref[...]) * score.slope(logits)
                ds = ds.astype(q.dtype)
                dk_acc[keys, :] += _dot(ds, q, 1, 0)
                if dq_ref is not None:
                    queries = pl.ds(pl.multiple_of(at.inner(b, s) * rows, rows), rows)
                    dq_ref[g, queries, :] += _dot(ds, k, 0, 0) * scale

        at.run(b, s, absorb)

        @pl.when(at.is_last(s) & (g == group - 1))
        def _():
            dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
            dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    dq = dq_spec = None
    if with_dq:
        dq = plan.result((plan.batch, plan.heads, plan.padded_queries, width), jnp.float32)
        dq_spec = pl.BlockSpec(
            (None, group, plan.padded_queries, width), lambda b, z, *_: (b, z, 0, 0), pipeline_mode=pl.Buffered(1)
        )
    keys = plan.tile.keys
    return plan.call(
        kernel,
        plan.tiles(by_queries=False),
        heads=plan.kv_heads,
        group=group,
        in_specs=[
            plan.spec(rows, width, q_index),
            plan.spec(keys, width, k_index),
            plan.spec(keys, v_width, k_index),
            plan.spec(rows, v_width, q_index),
            plan.spec(1, rows, lse_index),
            plan.spec(1, rows, lse_index),
            ids_specs,
        ],
        out_specs=[dq_spec, plan.spec(keys, width, k_index), plan.spec(keys, v_width, k_index)],
        out_shape=[dq, plan.result(k_BZSK.shape, k_BZSK.dtype), plan.result(v_BZSU.shape, v_BZSU.dtype)],
        scratch_shapes=[pltpu.VMEM((keys, width), jnp.float32), pltpu.VMEM((keys, v_width), jnp.float32)],
        products=(width, v_width, v_width, width) + (width,) * with_dq,
        name="flash_attention_backward" if with_dq else "flash_attention_backward_keys",
    )(*args, ids)


def _queries_backward(plan: "_Plan", args: tuple[jax.Array, ...], scale: float, softcap: float | None) -> jax.Array:
    """dq, a block of queries after the other."""
    q_BNTK, _, v_BZSU = args[:3]
    width, v_width, rows = q_BNTK.shape[-1], v_BZSU.shape[-1], plan.tile.queries
    score = _Score(plan=plan, scale=scale, softcap=softcap, q_axis=0)

    def q_index(b, n, s, t):
        return b, n, t.outer(s), 0

    def lse_index(b, n, s, t):
        return b, n, 0, t.outer(s)

    def k_index(b, n, s, t):
        return b, n // plan.group, t.inner(b, s), 0

    ids, ids_specs = plan.ids(
        q_axis=0, q_at=lambda b, n, s, t: (b, t.outer(s)), kv_at=lambda b, n, s, t: (b, t.inner(b, s))
    )

    def kernel(
        outer_ref, code_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_ref, dq_ref, acc, lse_acc, delta_acc
    ):
        at = _At(outer_ref, code_ref, plan)
        b, s = pl.program_id(0), pl.program_id(2)

        @pl.when(at.is_first(s))
        def _():
            acc[...] = jnp.zeros(acc.shape, jnp.float32)
            lse_acc[...] = jnp.broadcast_to(lse_ref[...], (LANES, rows)).T
            delta_acc[...] = jnp.broadcast_to(delta_ref[...], (LANES, rows)).T

        def absorb(masked: bool) -> None:
            for keys in plan.chunks:
                k, v = k_ref[keys, :], v_ref[keys, :]
                shown = logits = score(q_ref[...], k)
                if masked:
                    shown = score.hide(logits, ids_ref, at.outer(s), at.inner(b, s), keys)
                p = jnp.exp(shown - _lanes(lse_acc[...], logits.shape[1]))
                dp = _dot(do_ref[...], v, 1, 1)
                ds = p * (dp - _lanes(delta_acc[...], logits.shape[1])) * score.slope(logits)
                acc[...] += _dot(ds.astype(k.dtype), k, 1, 0)

        at.run(b, s, absorb)

        @pl.when(at.is_last(s))
        def _():
            dq_ref[...] = (acc[...] * scale).astype(dq_ref.dtype)

    keys = plan.tile.keys
    return plan.call(
        kernel,
        plan.tiles(by_queries=True),
        heads=plan.heads,
        in_specs=[
            plan.spec(rows, width, q_index),
            plan.spec(keys, width, k_index),
            plan.spec(keys, v_width, k_index),
            plan.spec(rows, v_width, q_index),
            plan.spec(1, rows, lse_index),
            plan.spec(1, rows, lse_index),
            ids_specs,
        ],
        out_specs=plan.spec(rows, width, q_index),
        out_shape=plan.result(q_BNTK.shape, q_BNTK.dtype),
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (width, LANES, LANES)],
        products=(width, v_width, width),
        name="flash_attention_backward_queries",
    )(*args, ids)


class _Ids(NamedTuple):
    """What a mask compares beside indices, of both sides: arrays, their blocks or their refs."""

    q_segments: Any = None
    kv_segments: Any = None
    q_positions: Any = None
    kv_positions: Any = None


@dataclasses.dataclass(frozen=True)
class _At:
    """Where a step stands in the list of tiles: in a kernel, and in what places its blocks."""

    outer_ref: Any
    code_ref: Any
    plan: "_Plan"

    def outer(self, s: Any) -> Any:
        """The block of the side that the list is sorted by."""
        return self.outer_ref[s]

    def _code(self, b: Any, s: Any) -> Any:
        # One list for all rows of the batch, or a list for each.
        steps = self.outer_ref.shape[0]
        return self.code_ref[s if self.code_ref.shape[0] == steps else b * steps + s]

    def inner(self, b: Any, s: Any) -> Any:
        """The block of the other side; that of an earlier tile, already there, if this tile is passed over."""
        return self._code(b, s) >> 2

    def is_first(self, s: Any) -> Any:
        return (s == 0) | (self.outer_ref[jnp.maximum(s - 1, 0)] != self.outer_ref[s])

    def is_last(self, s: Any) -> Any:
        end = self.outer_ref.shape[0] - 1
        return (s == end) | (self.outer_ref[jnp.minimum(s + 1, end)] != self.outer_ref[s])

    def run(self, b: Any, s: Any, absorb: Callable[[bool], None]) -> None:
        kind = self._code(b, s) & 3
        pl.when(kind == PARTLY)(lambda: absorb(True))
        pl.when(kind == WHOLLY)(lambda: absorb(False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Score:
    """Logits of a tile, [queries, keys] with q_axis = 0, else [keys, queries]."""

    plan: "_Plan"
    scale: float
    softcap: float | None
    q_axis: int

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        s = _dot(a, b, 1, 1) * self.scale
        return s if self.softcap is None else self.softcap * jnp.tanh(s * (1 / self.softcap))

    def slope(self, logits: jax.Array) -> jax.Array | float:
        return 1.0 if self.softcap is None else 1 - jnp.square(logits * (1 / self.softcap))

    def hide(self, s: jax.Array, ids: _Ids, q_block: Any, kv_block: Any, keys: slice) -> jax.Array:
        """HIDDEN where a query does not see a key; `keys` are those of the block that `s` holds."""
        mask, tile, conditions = self.plan.mask, self.plan.tile, []

        def of_queries(ref):
            return _lanes(ref[...], s.shape[1]) if self.q_axis == 0 else ref[...]

        def of_keys(ref):
            return ref[:, keys] if self.q_axis == 0 else _lanes(ref[keys, :], s.shape[1])

        kv = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1 - self.q_axis)
        kv_start = kv_block * tile.keys + keys.start
        if self.plan.num_keys < self.plan.padded_keys:
            conditions.append(kv < self.plan.num_keys - kv_start)
        if mask.ordered:
            if ids.q_positions is None:
                q_start = (mask.q_offset or 0) + q_block * tile.queries
                distance = kv - jax.lax.broadcasted_iota(jnp.int32, s.shape, self.q_axis)
                more = q_start - kv_start
            else:
                distance, more = of_keys(ids.kv_positions) - of_queries(ids.q_positions), 0
            if mask.right is not None:
                conditions.append(distance <= mask.right + more)
            if mask.left is not None:
                conditions.append(distance >= more - mask.left)
        if ids.q_segments is not None:
            q = of_queries(ids.q_segments)
            conditions.append((of_keys(ids.kv_segments) == q) & (q != 0))
        return jnp.where(functools.reduce(jnp.logical_and, conditions), s, HIDDEN) if conditions else s


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """How tiles cover a call. Arrays are [B, N, T, …] and [B, Z, S, …] here, padded to whole blocks."""

    batch: int
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    tile: Tile
    mask: Mask
    dtype: Any
    varies: Any  # over which mesh axes, inside shard_map

    @classmethod
    def of(cls, q_BTNK: jax.Array, k_BSZK: jax.Array, v_BSZU: jax.Array, mask: Mask, tile: Tile | None) -> "_Plan":
        if q_BTNK.dtype not in (jnp.bfloat16, jnp.float32):
            raise Unsupported(f"flash_attention on TPU takes bfloat16 and float32, not {q_BTNK.dtype}; 'xla' does")
        if mask.selected_BTS is not None:
            raise Unsupported("flash_attention on TPU has no selected_BTS; 'xla' does")
        (batch, num_queries, heads, width), (num_keys, kv_heads) = q_BTNK.shape, k_BSZK.shape[1:3]
        return cls(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            num_queries=num_queries,
            num_keys=num_keys,
            tile=tile or Tile.of(num_queries, num_keys, max(width, v_BSZU.shape[-1])),
            mask=mask,
            dtype=q_BTNK.dtype,
            varies=jax.typeof(q_BTNK).manual_axis_type,
        )

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def padded_queries(self) -> int:
        return _ceil(self.num_queries, self.tile.queries)

    @property
    def padded_keys(self) -> int:
        return _ceil(self.num_keys, self.tile.keys)

    @property
    def chunks(self) -> list[slice]:
        """Of a block's keys."""
        size = self.tile.keys_at_once
        return [slice(start, start + size) for start in range(0, self.tile.keys, size)]

    def queries(self, a_BTN: jax.Array, fill: float = 0) -> jax.Array:
        return _pad(a_BTN.swapaxes(1, 2), self.padded_queries, 2, constant_values=fill)

    def keys(self, a_BSZ: jax.Array) -> jax.Array:
        return _pad(a_BSZ.swapaxes(1, 2), self.padded_keys, 2)

    def heads_last(self, a_BNT: jax.Array) -> jax.Array:
        return a_BNT.swapaxes(1, 2)[:, : self.num_queries]

    def _padded_ids(self) -> _Ids:
        """[B, T] and [B, S]; what is padded is in no segment."""
        mask, T, S = self.mask, self.padded_queries, self.padded_keys
        found = {}
        if mask.q_segment_ids_BT is not None and mask.kv_segment_ids_BS is not None:
            found["q_segments"], found["kv_segments"] = (
                _pad(mask.q_segment_ids_BT, T, 1),
                _pad(mask.kv_segment_ids_BS, S, 1),
            )
        if mask.ordered and mask.q_positions_BT is not None and mask.kv_positions_BS is not None:
            found["q_positions"] = _pad(mask.q_positions_BT, T, 1, mode="edge")
            found["kv_positions"] = _pad(mask.kv_positions_BS, S, 1, mode="edge")
        return _Ids(**{name: a.astype(jnp.int32) for name, a in found.items()})

    def ids(self, q_axis: int, q_at: Callable, kv_at: Callable) -> tuple[_Ids, _Ids]:
        """The arrays and their blocks: the side along rows in every lane, the other along lanes."""

        def placed(a: jax.Array | None, size: int, axis: int, at: Callable) -> Any:
            if a is None:
                return None, None
            if axis == 0:
                a = jnp.broadcast_to(a[:, :, None], (*a.shape, LANES))
                return a, self._blocks((None, size, LANES), lambda *i: (*at(*i), 0))
            return a[:, None], self._blocks((None, 1, size), lambda *i: (at(*i)[0], 0, at(*i)[1]))

        sides = [(self.tile.queries, q_axis, q_at), (self.tile.keys, 1 - q_axis, kv_at)] * 2
        both = [placed(a, *side) for a, side in zip(self._padded_ids(), sides, strict=True)]
        return _Ids(*(a for a, _ in both)), _Ids(*(spec for _, spec in both))

    def spec(self, rows: int, width: int, index: Callable) -> pl.BlockSpec:
        return self._blocks((None, None, rows, width), index)

    def _blocks(self, shape: tuple[int | None, ...], index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *i: index(*i[:-2], _At(i[-2], i[-1], self)))

    def result(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.varies)

    def tiles(self, by_queries: bool) -> tuple[jax.Array, jax.Array]:
        """The list: the block that a side is sorted by, and 4 x the other block + what is visible, for each row if it differs."""
        mask, tile = self.mask, self.tile
        i, j = np.arange(self.padded_queries // tile.queries), np.arange(self.padded_keys // tile.keys)
        q = ((mask.q_offset or 0) + i * tile.queries)[:, None] + np.array([0, tile.queries - 1])
        kv = j[:, None] * tile.keys + np.array([0, tile.keys - 1])
        some_ij, all_ij = np.ones((i.size, j.size), bool), np.ones((i.size, j.size), bool)
        if self.num_keys < self.padded_keys:
            all_ij[:, -1] = False
        if mask.ordered and mask.q_positions_BT is None:
            some, every = self._ordered(q[:, None], kv[None])
            some_ij, all_ij = some_ij & some, all_ij & every
        kind_ij = np.where(some_ij, np.where(all_ij, WHOLLY, PARTLY), PASS)
        if not by_queries:
            kind_ij = kind_ij.T
        listed_ij = kind_ij != PASS
        listed_ij[:, 0] |= ~listed_ij.any(1)  # every block is written, if with zeros
        outer, inner = (a.astype(np.int32) for a in np.nonzero(listed_ij))
        kind = kind_ij[outer, inner].astype(np.int32)
        ids = self._padded_ids()
        kinds = jnp.asarray(kind)[None]
        if any(a is not None for a in ids):
            fits = outer.size * (1 + self.batch) * 4 <= SMEM_BYTES
            blocks = (outer, inner) if by_queries else (inner, outer)
            kinds = jnp.minimum(kinds, self._kinds(ids, *blocks) if fits else PARTLY)
        # A tile that is passed over keeps the blocks of the last one that was not.
        last = jax.lax.cummax(jnp.where(kinds != PASS, jnp.arange(outer.size, dtype=jnp.int32), 0), axis=1)
        codes = jnp.asarray(inner)[last] * 4 + kinds
        if (outer.size + codes.size) * 4 > SMEM_BYTES:
            raise Unsupported(f"flash_attention on TPU lists its tiles: {outer.size} are too many; 'xla' needs no list")
        return jnp.asarray(outer), codes.reshape(-1)

    def _ordered(self, q: Any, kv: Any) -> tuple[Any, Any]:
        """Whether some and whether all keys are near enough, by the least and greatest positions [..., 2] of both sides."""
        some, every = True, True
        if self.mask.right is not None:
            some &= kv[..., 0] <= q[..., 1] + self.mask.right
            every &= kv[..., 1] <= q[..., 0] + self.mask.right
        if self.mask.left is not None:
            some &= kv[..., 1] >= q[..., 0] - self.mask.left
            every &= kv[..., 0] >= q[..., 1] - self.mask.left
        return some, every

    def _kinds(self, ids: _Ids, q_blocks: np.ndarray, kv_blocks: np.ndarray) -> jax.Array:
        """For each row and tile what positions and segments say, [B, steps]."""

        def extremes(a: jax.Array, size: int) -> jax.Array:
            a = a.reshape(a.shape[0], -1, size)
            return jnp.stack([a.min(-1), a.max(-1)], -1)

        some, every = jnp.ones((1, 1), bool), jnp.ones((1, 1), bool)
        if ids.q_positions is not None:
            q, kv = extremes(ids.q_positions, self.tile.queries), extremes(ids.kv_positions, self.tile.keys)
            some, every = self._ordered(q[:, q_blocks], kv[:, kv_blocks])
        if ids.q_segments is not None:
            q, kv = (
                extremes(ids.q_segments, self.tile.queries)[:, q_blocks],
                extremes(ids.kv_segments, self.tile.keys)[:, kv_blocks],
            )
            some &= (kv[..., 0] <= q[..., 1]) & (kv[..., 1] >= q[..., 0])
            some &= (q != 0).any(-1) & (kv != 0).any(-1)
            every &= (
                (q[..., 0] == q[..., 1]) & (kv[..., 0] == kv[..., 1]) & (q[..., 0] == kv[..., 0]) & (q[..., 0] != 0)
            )
        return jnp.where(some, jnp.where(every, WHOLLY, PARTLY), PASS).astype(jnp.int32)

    def call(
        self,
        kernel: Callable,
        tiles: tuple[jax.Array, jax.Array],
        *,
        heads: int,
        group: int | None = None,
        in_specs: list[Any],
        out_specs: Any,
        out_shape: Any,
        scratch_shapes: list[Any],
        products: tuple[int, ...],
        name: str,
    ) -> Callable:
        steps, inner = tiles[0].size, () if group is None else (group,)
        axes = tuple(self.varies.varying)
        scores = self.batch * self.heads * steps * self.tile.queries * self.tile.keys
        read = self.batch * self.heads * (steps * self.tile.keys + self.padded_queries)
        run = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.batch, heads, steps, *inner),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch_shapes,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", *("arbitrary" for _ in inner)),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * scores * sum(products),
                transcendentals=scores,
                bytes_accessed=read * (products[0] + products[1]) * jnp.dtype(self.dtype).itemsize,
            ),
            name=name,
        )
        return functools.partial(run, *(jax.lax.pcast(a, axes, to="varying") if axes else a for a in tiles))


def _ceil(length: int, size: int) -> int:
    return math.ceil(length / size) * size


def _even(length: int, most: int) -> int:
    """Size of as few equal parts of at most `most` as hold `length`."""
    return _ceil(math.ceil(length / math.ceil(length / most)), LANES)


def _pad(a: jax.Array, length: int, axis: int, **how: Any) -> jax.Array:
    missing = length - a.shape[axis]
    return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)], **how) if missing else a


def _lanes(a: jax.Array, width: int) -> jax.Array:
    """[rows, width] of what is the same in each of LANES lanes."""
    return jnp.tile(a, (1, math.ceil(width / LANES)))[:, :width]


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
