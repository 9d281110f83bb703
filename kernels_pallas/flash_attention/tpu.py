"""Attention as Mosaic TPU kernels: one forward, and backward one or two; the probabilities are recomputed.

The grid walks a list of tiles, a block of queries by a block of keys, with only those in which some query may see some key. What
indices decide, decides which are on the list; what positions and segment ids decide, which of these are passed over while running.

JAX's own splash attention is not behind this: it cannot run inside a `shard_map` that checks types, its fused backward pass keeps
a dq for each block of keys (memory T·S), it takes no positions and passes nothing over by segments.
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.flash_attention.tpu_plan import LANES, Plan, Tile
from kernels_pallas.flash_attention.tpu_walk import HIDDEN, LOG2_E, Score, Walk, dot, lanes

WHOLE_DQ_BYTES = 16 << 20  # of VMEM that the dq of all queries may take


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
    plan = Plan.of(q_BTNK, k_BSZK, v_BSZU, mask, tile or Tile.of(q_BTNK, k_BSZK, v_BSZU, tall=True))
    walk = Walk(plan=plan, by_queries=True)
    score = Score(walk=walk, scale=scale, softcap=softcap)
    width, v_width, rows = q_BTNK.shape[-1], v_BSZU.shape[-1], plan.tile.queries

    def kernel(outer_ref, code_ref, q_ref, k_ref, v_ref, sinks_ref, ids_ref, o_ref, lse_ref, m_ref, l_ref, acc_ref):
        step = walk.step(outer_ref, code_ref)

        @pl.when(step.is_first)
        def _():
            if sinks_ref is None:
                m_ref[...] = jnp.full(m_ref.shape, HIDDEN, jnp.float32)
                l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
            else:
                m_ref[...] = jnp.broadcast_to(jnp.maximum(sinks_ref[...] * LOG2_E, HIDDEN), m_ref.shape)
                lane = jax.lax.broadcasted_iota(jnp.int32, l_ref.shape, 1)
                l_ref[...] = jnp.where((m_ref[...] > HIDDEN) & (lane == 0), 1.0, 0.0)
            acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

        @step.run
        def _(masked: bool):
            m, l = m_ref[...], l_ref[...]
            for keys in plan.chunks:
                s = score(q_ref[...], k_ref[keys, :])
                if masked:
                    s = score.hide(s, ids_ref, step, keys)
                m_before, m = m, jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
                p = jnp.exp2(s - lanes(m, s.shape[1]))
                kept = jnp.exp2(m_before - m)
                # A sum in each lane: those of lanes are added up once, at the end.
                l = l * kept + sum(p[:, i : i + LANES] for i in range(0, p.shape[1], LANES))
                acc_ref[...] = acc_ref[...] * lanes(kept, v_width) + dot(p.astype(v_ref.dtype), v_ref[keys, :], 1, 0)
            m_ref[...], l_ref[...] = m, l

        @pl.when(step.is_last)
        def _():
            some = m_ref[...] > HIDDEN / 2
            total = jnp.where(some, jnp.sum(l_ref[...], axis=1, keepdims=True), 1.0)
            o_ref[...] = jnp.where(lanes(some, v_width), acc_ref[...] / lanes(total, v_width), 0).astype(o_ref.dtype)
            lse_ref[...] = jnp.where(some, m_ref[...] * (1 / LOG2_E) + jnp.log(total), -jnp.inf).T[:1]

    sinks_N1L = sinks_spec = None
    if sinks_N is not None:
        sinks_N1L = jnp.broadcast_to(sinks_N.astype(jnp.float32)[:, None, None], (plan.heads, 1, LANES))
        sinks_spec = pl.BlockSpec((None, 1, LANES), lambda b, n, *_: (n, 0, 0))
    padded = plan.batch, plan.heads, plan.padded_queries
    o_BNTU, lse_BN1T = walk.call(
        kernel,
        in_specs=[walk.queries(width), walk.keys(width), walk.keys(v_width), sinks_spec, walk.ids_specs],
        out_specs=[walk.queries(v_width), walk.per_query],
        out_shape=[
            plan.result((*padded, v_width), q_BTNK.dtype),
            plan.result((*padded[:2], 1, padded[2]), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, v_width)],
        products=(width, v_width),
        name="flash_attention_forward",
    )(plan.queries(q_BTNK), plan.keys(k_BSZK), plan.keys(v_BSZU), sinks_N1L, walk.ids)
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
    plan = Plan.of(q_BTNK, k_BSZK, v_BSZU, mask, tile or Tile.of(q_BTNK, k_BSZK, v_BSZU))
    # Where a query sees nothing, exp2(s - lse) is then 0.
    lse_BN1T = plan.queries(jnp.where(lse_BTN == -jnp.inf, jnp.inf, lse_BTN), fill=jnp.inf)[:, :, None] * LOG2_E
    delta_BN1T = plan.queries(delta_BTN)[:, :, None]
    args = plan.queries(q_BTNK), plan.keys(k_BSZK), plan.keys(v_BSZU), plan.queries(dout_BTNU), lse_BN1T, delta_BN1T
    whole_dq = 4 * plan.group * plan.padded_queries * pl.cdiv(q_BTNK.shape[-1], LANES) * LANES
    dq_BNTK, dk_BZSK, dv_BZSU = _keys_backward(plan, args, scale, softcap, with_dq=whole_dq <= WHOLE_DQ_BYTES)
    if dq_BNTK is None:
        dq_BNTK = _queries_backward(plan, args, scale, softcap)
    dk_BSZK, dv_BSZU = (a.swapaxes(1, 2)[:, : plan.num_keys] for a in (dk_BZSK, dv_BZSU))
    return plan.heads_last(dq_BNTK).astype(q_BTNK.dtype), dk_BSZK, dv_BSZU


def _keys_backward(
    plan: Plan, args: tuple[jax.Array, ...], scale: float, softcap: float | None, with_dq: bool
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """dk and dv, one block of keys after the other, and if wanted dq of all queries of a group at once in VMEM."""
    q_BNTK, k_BZSK, v_BZSU = args[:3]
    width, v_width, rows = q_BNTK.shape[-1], v_BZSU.shape[-1], plan.tile.queries
    walk = Walk(plan=plan, by_queries=False)
    score = Score(walk=walk, scale=scale, softcap=softcap)

    def kernel(outer_ref, code_ref, *refs):
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_ref, dq_ref, dk_ref, dv_ref, dk_acc, dv_acc = refs
        step = walk.step(outer_ref, code_ref)

        @pl.when(step.is_first)
        def _():
            dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
            dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

        if dq_ref is not None:

            @pl.when(step.is_very_first)
            def _():
                dq_ref[...] = jnp.zeros(dq_ref.shape, jnp.float32)

        @step.run
        def _(masked: bool):
            for keys in plan.chunks:
                q, k, do = q_ref[...], k_ref[keys, :], do_ref[...]
                shown = s = score(q, k)
                if masked:
                    shown = score.hide(s, ids_ref, step, keys)
                p = jnp.exp2(shown - lse_ref[...])
                dv_acc[keys, :] += dot(p.astype(do.dtype), do, 1, 0)
                ds = p * (dot(v_ref[keys, :], do, 1, 1) - delta_ref[...]) * score.slope(s)
                ds = ds.astype(q.dtype)
                dk_acc[keys, :] += dot(ds, q, 1, 0)
                if dq_ref is not None:
                    queries = pl.ds(pl.multiple_of(step.q_block * rows, rows), rows)
                    dq_ref[step.head_of_group, queries, :] += dot(ds, k, 0, 0) * scale

        @pl.when(step.is_last)
        def _():
            dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
            dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    dq = dq_spec = None
    if with_dq:
        dq = plan.result(q_BNTK.shape, jnp.float32)
        block = None, plan.group, plan.padded_queries, width
        dq_spec = pl.BlockSpec(block, lambda b, z, *_: (b, z, 0, 0), pipeline_mode=pl.Buffered(1))
    return walk.call(
        kernel,
        in_specs=_backward_specs(walk, width, v_width),
        out_specs=[dq_spec, walk.keys(width), walk.keys(v_width)],
        out_shape=[dq, plan.result(k_BZSK.shape, k_BZSK.dtype), plan.result(v_BZSU.shape, v_BZSU.dtype)],
        scratch_shapes=[pltpu.VMEM((plan.tile.keys, width), jnp.float32) for width in (width, v_width)],
        products=(width, v_width, v_width, width) + (width,) * with_dq,
        name="flash_attention_backward" if with_dq else "flash_attention_backward_keys",
    )(*args, walk.ids)


def _queries_backward(plan: Plan, args: tuple[jax.Array, ...], scale: float, softcap: float | None) -> jax.Array:
    """dq, one block of queries after the other."""
    q_BNTK, v_BZSU = args[0], args[2]
    width, v_width, rows = q_BNTK.shape[-1], v_BZSU.shape[-1], plan.tile.queries
    walk = Walk(plan=plan, by_queries=True)
    score = Score(walk=walk, scale=scale, softcap=softcap)

    def kernel(outer_ref, code_ref, *refs):
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ids_ref, dq_ref, acc, lse, delta = refs
        step = walk.step(outer_ref, code_ref)

        @pl.when(step.is_first)
        def _():
            acc[...] = jnp.zeros(acc.shape, jnp.float32)
            lse[...] = jnp.broadcast_to(lse_ref[...], (LANES, rows)).T
            delta[...] = jnp.broadcast_to(delta_ref[...], (LANES, rows)).T

        @step.run
        def _(masked: bool):
            for keys in plan.chunks:
                k = k_ref[keys, :]
                shown = s = score(q_ref[...], k)
                if masked:
                    shown = score.hide(s, ids_ref, step, keys)
                p = jnp.exp2(shown - lanes(lse[...], s.shape[1]))
                dp = dot(do_ref[...], v_ref[keys, :], 1, 1)
                ds = p * (dp - lanes(delta[...], s.shape[1])) * score.slope(s)
                acc[...] += dot(ds.astype(k.dtype), k, 1, 0)

        @pl.when(step.is_last)
        def _():
            dq_ref[...] = (acc[...] * scale).astype(dq_ref.dtype)

    return walk.call(
        kernel,
        in_specs=_backward_specs(walk, width, v_width),
        out_specs=walk.queries(width),
        out_shape=plan.result(q_BNTK.shape, q_BNTK.dtype),
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (width, LANES, LANES)],
        products=(width, v_width, width),
        name="flash_attention_backward_queries",
    )(*args, walk.ids)


def _backward_specs(walk: Walk, width: int, v_width: int) -> list:
    return [
        walk.queries(width),
        walk.keys(width),
        walk.keys(v_width),
        walk.queries(v_width),
        walk.per_query,
        walk.per_query,
        walk.ids_specs,
    ]
