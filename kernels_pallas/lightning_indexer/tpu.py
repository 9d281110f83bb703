"""Index scores as a Mosaic TPU kernel. The choice of keys and the losses are plain JAX.

Keys lie along sublanes and queries along lanes, those of some heads side by side: so the weights of heads are rows, and the sum
over heads adds registers.
"""

import functools
import math
import operator

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.flash_attention.tpu_walk import lanes
from kernels_pallas.lightning_indexer import topk as choice
from kernels_pallas.lightning_indexer import xla
from kernels_pallas.lightning_indexer.selection import Scores, Work, scores_by
from kernels_pallas.select import Unsupported
from kernels_pallas.vary import vary_alike

LANES, SUBLANES = 128, 8
KEYS = 512  # of a tile
QUERIES = 128  # most of a tile
COLUMNS = 256  # queries times heads at a time, what the widest matrix units hold
AT_ONCE = 4  # products before their sum is stored
MOST_BYTES = 8 << 20  # of VMEM for a tile of queries, of which it holds two
VMEM_BYTES = 56 << 20  # of the 64 MiB that the chips with least have

dense_kl, dense_kl_gradients = xla.dense_kl, xla.dense_kl_gradients
selected_kl, selected_kl_gradients = xla.selected_kl, xla.selected_kl_gradients
recall = xla.recall


def select_keys(
    q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, k_scale_BS: jax.Array | None, mask: Mask, *, topk: int
) -> jax.Array:
    """The chosen keys [B, T, W], ascending, S for what is missing. Raises Unsupported."""
    return index_scores(q_BTIJ, w_BTI, k_BSJ, k_scale_BS, mask).choose(topk)


def index_scores(
    q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, k_scale_BS: jax.Array | None, mask: Mask
) -> Scores:
    """Raises Unsupported."""
    heads, width = q_BTIJ.shape[2:]
    if k_BSJ.dtype.itemsize == 1:
        k_BSJ = k_BSJ.astype(jnp.bfloat16)  # exactly; queries follow, a block at a time
    if k_BSJ.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"select_keys on TPU has float32, bfloat16 and FP8, not {k_BSJ.dtype}; 'xla' has more")
    if SUBLANES * heads * width * k_BSJ.dtype.itemsize > MOST_BYTES:
        raise Unsupported(f"select_keys on TPU has no room for {heads} index heads of {width} numbers; 'xla' does")
    keys = min(KEYS, LANES * pl.cdiv(k_BSJ.shape[1], LANES))
    return scores_by(functools.partial(sortable_scores, keys=keys), q_BTIJ, w_BTI, k_BSJ, k_scale_BS, mask, keys=keys)


def sortable_scores(work: Work, *, keys: int) -> jax.Array:
    """int32 [b, t, S], HIDDEN where a query does not see a key."""
    batch, num_queries, heads, width = work.q_btIJ.shape
    dtype, num_keys, sight = work.k_RSJ.dtype, work.k_RSJ.shape[1], work.sight
    queries = _queries(num_queries, heads * width * dtype.itemsize)
    blocks, side = pl.cdiv(num_queries, queries), COLUMNS // queries
    groups = pl.cdiv(heads, side)
    at_once = math.gcd(groups, AT_ONCE)

    def by_groups(a_btI: jax.Array) -> jax.Array:
        """[b, blocks, groups, COLUMNS, …], of `side` heads each; queries and heads are added, the latter of weight 0."""
        added = [(0, 0), (0, blocks * queries - num_queries), (0, groups * side - heads)]
        a_btI = jnp.pad(a_btI, [*added, *[(0, 0)] * (a_btI.ndim - 3)])
        a = a_btI.reshape(batch, blocks, queries, groups, side, *a_btI.shape[3:])
        return jnp.moveaxis(a, 2, 4).reshape(batch, blocks, groups, COLUMNS, *a_btI.shape[3:])

    def kernel(span_ref, q_ref, w_ref, k_ref, k_scale_ref, q_ids_ref, kv_ids_ref, out_ref):
        tile = pl.program_id(2)
        seen = (span_ref[1] <= tile) & (tile < span_ref[2])

        @pl.when(jnp.logical_not(seen))
        def _():
            out_ref[...] = jnp.full(out_ref.shape, choice.HIDDEN, jnp.int32)

        @pl.when(seen)
        def _():
            def add(step, sums):
                for group in range(at_once):
                    group += step * at_once
                    sums += jnp.maximum(_dot(k_ref[...], q_ref[group]), 0) * w_ref[pl.ds(group, 1), :]
                return sums

            sums = jnp.zeros((keys, COLUMNS), jnp.float32)
            sums = jax.lax.fori_loop(0, groups // at_once, add, sums).T
            score = functools.reduce(operator.add, [sums[i * queries : (i + 1) * queries] for i in range(side)])
            if k_scale_ref is not None:
                score *= k_scale_ref[...]
            key = choice.sortable(score)
            visible = sight(
                [lanes(q_ids_ref[kind], keys) for kind in range(sight.kinds)],
                [kv_ids_ref[kind : kind + 1, :] for kind in range(sight.kinds)],
                tile * keys + jax.lax.broadcasted_iota(jnp.int32, key.shape, 1),
            )
            out_ref[...] = key if visible is None else jnp.where(visible, key, choice.HIDDEN)

    def of_keys(*before: int) -> pl.BlockSpec:
        """Keys lie along the dim behind these; tiles that nobody sees are not read."""

        def place(row, block, tile, span_ref):
            seen = jnp.clip(tile, span_ref[1], jnp.maximum(span_ref[2] - 1, span_ref[1]))
            return (span_ref[0] + row, *[0] * len(before), seen, *[0] * (1 - len(before)))

        return pl.BlockSpec((None, *before, keys, *[width] * (1 - len(before))), place)

    q_ids, k_scale_R1S = work.q_ids, work.k_scale_RS
    if q_ids is not None:  # in every lane
        q_ids = jnp.pad(q_ids, ((0, 0), (0, 0), (0, blocks * queries - num_queries)))
        q_ids = jnp.broadcast_to(q_ids[..., None], (*q_ids.shape, LANES))
    if k_scale_R1S is not None:
        k_scale_R1S = k_scale_R1S.astype(jnp.float32)[:, None]
    operands = by_groups(work.q_btIJ.astype(dtype)), by_groups(work.w_btI.astype(jnp.float32)), work.k_RSJ
    span, *operands = vary_alike((work.span, *operands, k_scale_R1S, q_ids, work.kv_ids))
    in_specs = [
        pl.BlockSpec((None, None, groups, COLUMNS, width), lambda row, block, *_: (row, block, 0, 0, 0)),
        pl.BlockSpec((None, None, groups, COLUMNS), lambda row, block, *_: (row, block, 0, 0)),
        of_keys(),
        None if k_scale_R1S is None else of_keys(1),
        None
        if q_ids is None
        else pl.BlockSpec((None, sight.kinds, queries, LANES), lambda row, block, *_: (row, 0, block, 0)),
        None if work.kv_ids is None else of_keys(sight.kinds),
    ]
    key_btS = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks, num_keys // keys),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((None, queries, keys), lambda row, block, tile, _: (row, block, tile)),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (batch, blocks * queries, num_keys), jnp.int32, manual_axis_type=jax.typeof(span).manual_axis_type
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * blocks * queries * num_keys * heads * width,
            transcendentals=0,
            bytes_accessed=batch * num_keys * blocks * (width * dtype.itemsize + 4 * queries),
        ),
        name="index_scores",
    )(span, *operands)
    return key_btS[:, :num_queries]


def _queries(number: int, size: int) -> int:
    """Of a tile, a power of two; `size`: bytes of a query."""
    queries = QUERIES
    while queries > SUBLANES and (queries >= 2 * number or queries * size > MOST_BYTES):
        queries //= 2
    return queries


def _dot(k_sJ: jax.Array, q_xJ: jax.Array) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if k_sJ.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(k_sJ, q_xJ, dims, precision=exact, preferred_element_type=jnp.float32)
