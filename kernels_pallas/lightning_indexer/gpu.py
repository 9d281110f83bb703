"""Index scores as a Mosaic GPU kernel (Hopper). The choice of keys and the losses are plain JAX.

A block of threads keeps 256 keys in shared memory and walks over queries, all heads of a few at a time: one warpgroup brings them
by TMA, two compute, each for half of the keys. Rows of a product are keys, so that the sum over heads is one along rows.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.hopper import (
    PER_COLUMN,
    PER_ROW,
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    SHARED_MEMORY,
    WARPGROUPS,
    compiler_params,
    down,
    multiply,
    pad,
)
from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.grouped_gemm.turns import BLOCKS, SWIZZLE, smem
from kernels_pallas.lightning_indexer import topk as choice
from kernels_pallas.lightning_indexer import xla
from kernels_pallas.lightning_indexer.selection import Scores, Work, scores_by
from kernels_pallas.select import Unsupported
from kernels_pallas.vary import vary_alike

KEYS = 256  # of a block of threads
COLUMNS = 128  # queries times heads of a product, unless one query has more heads
MOST_HEADS = 256  # that one product takes
STAGES = 4  # at most
START = 2  # what a block of threads costs before its first product, in turns; an estimate

dense_kl, dense_kl_gradients = xla.dense_kl, xla.dense_kl_gradients
selected_kl, selected_kl_gradients = xla.selected_kl, xla.selected_kl_gradients
recall = xla.recall


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How queries are walked over; sizes are padded ones."""

    queries: int
    heads: int
    width_bytes: int
    stages: int  # tiles of queries on their way or in use

    def __post_init__(self):
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self} needs {self.shared_memory} bytes of shared memory; a block has {SHARED_MEMORY}")

    @classmethod
    def of(cls, heads: int, width_bytes: int) -> "Tile":
        """As many stages as fit. Raises Unsupported."""
        if heads <= MOST_HEADS:
            for stages in range(STAGES, 1, -1):
                try:
                    queries = max(1, COLUMNS // heads)
                    return cls(queries=queries, heads=heads, width_bytes=width_bytes, stages=stages)
                except ValueError:
                    continue
        raise Unsupported(
            f"select_keys on gpu has no room for {heads} index heads of {width_bytes} bytes; 'xla' takes all"
        )

    @property
    def columns(self) -> int:
        return self.queries * self.heads

    @property
    def shared_memory(self) -> int:
        rows = KEYS + self.stages * self.columns
        return rows * self.width_bytes + 4 * self.stages * self.columns + 16 * KEYS + 2048  # ids and scales; barriers


def select_keys(
    q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, k_scale_BS: jax.Array | None, mask: Mask, *, topk: int
) -> jax.Array:
    """The chosen keys [B, T, W], ascending, S for what is missing. Raises Unsupported."""
    return index_scores(q_BTIJ, w_BTI, k_BSJ, k_scale_BS, mask).choose(topk)


def index_scores(
    q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, k_scale_BS: jax.Array | None, mask: Mask
) -> Scores:
    """Raises Unsupported."""
    if q_BTIJ.dtype not in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        raise Unsupported(f"select_keys on gpu has bfloat16, float16 and float8_e4m3fn, not {q_BTIJ.dtype}")
    # Whole swizzles, and what is added has weight 0.
    numbers = SWIZZLE // q_BTIJ.dtype.itemsize
    q_BTIJ, w_BTI, k_BSJ = pad(pad(q_BTIJ, 3, numbers), 2, 8), pad(w_BTI, 2, 8), pad(k_BSJ, 2, numbers)
    tile = Tile.of(q_BTIJ.shape[2], q_BTIJ.shape[3] * q_BTIJ.dtype.itemsize)
    kernel = functools.partial(sortable_scores, tile=tile)
    return scores_by(kernel, q_BTIJ, w_BTI, k_BSJ, k_scale_BS, mask, keys=KEYS)


def sortable_scores(work: Work, *, tile: Tile, num_sms: int = BLOCKS) -> jax.Array:
    """int32 [b, t, S], HIDDEN where a query does not see a key."""
    batch, num_queries, _, width = work.q_btIJ.shape
    dtype, num_keys, sight = work.q_btIJ.dtype, work.k_RSJ.shape[1], work.sight
    turns = pl.cdiv(num_queries, tile.queries)
    splits = choose_splits(batch * (num_keys // KEYS), turns, num_sms)
    turns = pl.cdiv(turns, splits)
    own = turns * tile.queries  # queries of a block of threads
    q_bxJ = pad(work.q_btIJ, 1, splits * own).reshape(batch, -1, width)
    w_bx = pad(work.w_btI.astype(jnp.float32), 1, splits * own).reshape(batch, -1)
    optional = {
        "k_scale": None if work.k_scale_RS is None else work.k_scale_RS.astype(jnp.float32),
        "q_ids": None if work.q_ids is None else pad(work.q_ids, 2, splits * own),
        "kv_ids": work.kv_ids,
    }
    there = {name: a for name, a in optional.items() if a is not None}
    copies = 1 + ("k_scale" in there) + ("kv_ids" in there)

    def index_scores(*refs):
        refs = list(refs)
        take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
        span_gmem, q_gmem, w_gmem, k_gmem = take(4)
        gmem = dict(zip(there, take(len(there)), strict=True))
        (out_gmem,) = take(1)
        k_here, q_here, q_free, k_smem, q_smem, w_smem = take(6)
        k_scale_smem = take(1)[0] if "k_scale" in gmem else None
        kv_ids_smem = take(1)[0] if "kv_ids" in gmem else None
        b, block, split, wg = (jax.lax.axis_index(name) for name in ("row", "keys", "split", "warpgroup"))
        # What is loaded has a type of shard_map, with which no loop in a kernel can be traced, and arithmetic sheds it.
        row, first, end = (span_gmem[i] + 0 for i in range(3))
        row, seen = row + b, (first <= block) & (block < end)

        def slot_of(turn):
            return jax.lax.rem(turn, jnp.int32(tile.stages))

        @pl.when((wg == WARPGROUPS) & seen)
        def _bring():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            keys = pl.ds(block * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(k_gmem.at[row, keys], k_smem, k_here)
            if k_scale_smem is not None:
                plgpu.copy_gmem_to_smem(gmem["k_scale"].at[row, keys], k_scale_smem, k_here)
            if kv_ids_smem is not None:
                plgpu.copy_gmem_to_smem(gmem["kv_ids"].at[row, :, keys], kv_ids_smem, k_here)

            def bring(turn, _):
                slot, columns = slot_of(turn), pl.ds((split * turns + turn) * tile.columns, tile.columns)
                pl.when(turn >= tile.stages)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q_gmem.at[b, columns], q_smem.at[slot], q_here.at[slot])
                plgpu.copy_gmem_to_smem(w_gmem.at[b, columns], w_smem.at[slot], q_here.at[slot])
                return ()

            jax.lax.fori_loop(jnp.int32(0), jnp.int32(turns), bring, ())

        parts = [wg * (KEYS // WARPGROUPS) + at for at in range(0, KEYS // WARPGROUPS, ROWS)]

        @pl.when((wg < WARPGROUPS) & seen)
        def _compute():
            plgpu.set_max_registers(REGISTERS, action="increase")
            plgpu.barrier_wait(k_here)

            def per_key(smem, part):
                return plgpu.layout_cast(smem[pl.ds(part, ROWS)], PER_ROW)

            scales = [None if k_scale_smem is None else per_key(k_scale_smem, part) for part in parts]
            kinds = [] if kv_ids_smem is None else [kv_ids_smem.at[kind] for kind in range(sight.kinds)]
            ids = [[per_key(kind, part) for kind in kinds] for part in parts]

            def score(turn, _):
                slot = slot_of(turn)
                plgpu.barrier_wait(q_here.at[slot])
                weight = plgpu.layout_cast(w_smem[slot], PER_COLUMN)
                for part, scale, kv_ids in zip(parts, scales, ids, strict=True):
                    logits = multiply(k_smem.at[pl.ds(part, ROWS)], q_smem.at[slot].T)
                    weighted = jnp.maximum(logits, 0.0) * down(weight, logits.shape)
                    place = block * KEYS + part
                    for i in range(tile.queries):
                        total = jnp.sum(weighted[:, i * tile.heads : (i + 1) * tile.heads], axis=1)
                        key = choice.sortable(total if scale is None else total * scale)
                        query = split * own + turn * tile.queries + i
                        q_ids = [gmem["q_ids"][b, kind, query] + 0 for kind in range(sight.kinds)]
                        places = place + plgpu.broadcasted_iota(jnp.int32, key.shape, 0, layout=PER_ROW)
                        visible = sight(q_ids, kv_ids, places)
                        key = key if visible is None else jnp.where(visible, key, choice.HIDDEN)
                        out_gmem[b, query, pl.ds(place, ROWS)] = key
                plgpu.commit_smem()  # what TMA overwrites has been read
                plgpu.barrier_arrive(q_free.at[slot])
                return ()

            jax.lax.fori_loop(jnp.int32(0), jnp.int32(turns), score, ())

        @pl.when((wg < WARPGROUPS) & jnp.logical_not(seen))
        def _hide():
            hidden = plgpu.layout_cast(jnp.full((ROWS,), choice.HIDDEN, jnp.int32), PER_ROW)

            def hide(query, _):
                for part in parts:
                    out_gmem[b, split * own + query, pl.ds(block * KEYS + part, ROWS)] = hidden
                return ()

            jax.lax.fori_loop(jnp.int32(0), jnp.int32(own), hide, ())

    key_btS = plgpu.kernel(
        index_scores,
        out_type=jax.ShapeDtypeStruct((batch, splits * own, num_keys), jnp.int32),
        scratch_types=[
            plgpu.Barrier(num_arrivals=copies),
            plgpu.Barrier(num_barriers=tile.stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=tile.stages, num_arrivals=WARPGROUPS),
            smem((KEYS, width), dtype),
            smem((tile.stages, tile.columns, width), dtype),
            plgpu.SMEM((tile.stages, tile.columns), jnp.float32),
            *([plgpu.SMEM((KEYS,), jnp.float32)] if "k_scale" in there else []),
            *([plgpu.SMEM((sight.kinds, KEYS), jnp.int32)] if "kv_ids" in there else []),
        ],
        grid=(batch, num_keys // KEYS, splits),
        grid_names=("row", "keys", "split"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
    )(work.span, q_bxJ, w_bx, work.k_RSJ, *there.values())
    # Kernels leave what their results vary over out of the types.
    return vary_alike((key_btS, q_bxJ))[0][:, :num_queries]


def choose_splits(blocks: int, turns: int, num_sms: int) -> int:
    """Parts of the queries for blocks of threads of their own: the least time if all keys are seen, in whole waves."""
    return min(
        range(1, min(turns, num_sms) + 1),
        key=lambda splits: pl.cdiv(blocks * splits, num_sms) * (pl.cdiv(turns, splits) + START),
    )
