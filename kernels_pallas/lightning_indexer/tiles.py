"""How the plain-JAX indexer walks queries and keys: blocks of queries in a scan, chunks of the keys that a block may see."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.lightning_indexer.topk import WORD
from kernels_pallas.select import platform

BLOCK, CPU_BLOCK = 256, 64  # most queries at a time; on CPU less, but not less than the second,
CPU_SCORES = 1 << 21  # so that their scores are no more than this, and stay in the cache
TILE, CPU_TILE = 1 << 26, 1 << 20  # logits at a time over all heads
LEAST_CHUNK = 128  # keys at a time, if there are so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """B rows of T queries and S keys, in steps of `rows` rows by `block` queries, by `chunks` chunks of keys.

    A step takes one row, or all rows if one block holds their queries. Arrays of queries are cut to [steps, b, t, …], arrays of
    keys to [row groups, b, S, …], padded to whole blocks and chunks. Where a mask compares, padding is hidden: only of keys, for
    the results of padded queries are cut off.
    """

    batch: int
    num_queries: int
    num_keys: int
    rows: int
    block: int
    blocks: int
    chunk: int
    chunks: int

    @classmethod
    def of(cls, q_BT: jax.Array, k_BS: jax.Array, heads: int, multiple: int = WORD) -> "Tiles":
        """For queries [B, T, …] and keys [B, S, …]; `heads`: the most of them whose logits are held together.

        Chunks of keys are multiples of `multiple`, which is one of whole words.
        """
        batch, num_queries, num_keys, cpu = q_BT.shape[0], q_BT.shape[1], k_BS.shape[1], platform() == "cpu"
        most = max(CPU_BLOCK, min(BLOCK, CPU_SCORES // num_keys)) if cpu else BLOCK
        blocks = math.ceil(num_queries / most)
        block = math.ceil(num_queries / blocks)
        rows = batch if batch * block <= most else 1
        chunks = math.ceil(num_keys / max(LEAST_CHUNK, (CPU_TILE if cpu else TILE) // (rows * block * heads)))
        chunk = multiple * math.ceil(num_keys / chunks / multiple)
        chunks = math.ceil(num_keys / chunk)
        return cls(
            batch=batch,
            num_queries=num_queries,
            num_keys=num_keys,
            rows=rows,
            block=block,
            blocks=blocks,
            chunk=chunk,
            chunks=chunks,
        )

    @property
    def padded_keys(self) -> int:
        return self.chunks * self.chunk

    def cut_queries(self, a_BT: jax.Array, mode: str = "constant") -> jax.Array:
        a_BT = _pad(a_BT, self.blocks * self.block, mode=mode)
        return a_BT.reshape(-1, self.rows, self.block, *a_BT.shape[2:])

    def join_queries(self, a_ibt: jax.Array) -> jax.Array:
        return a_ibt.reshape(self.batch, -1, *a_ibt.shape[3:])[:, : self.num_queries]

    def cut_keys(self, a_BS: jax.Array, mode: str = "constant") -> jax.Array:
        a_BS = _pad(a_BS, self.padded_keys, mode=mode)
        return a_BS.reshape(-1, self.rows, *a_BS.shape[1:])

    def join_keys(self, a_gbS: jax.Array) -> jax.Array:
        return a_gbS.reshape(self.batch, -1, *a_gbS.shape[3:])[:, : self.num_keys]

    def keys_at(self, keys: Any, step: Any, start: Any) -> Any:
        """The chunk at `start` of all that was cut by `cut_keys`, [b, s, …], for the rows of a step."""
        return jax.tree.map(lambda a: _slice(a[self.group(step)], start, self.chunk, axis=1), keys)

    def group(self, step: Any) -> Any:
        """Which group of rows a step belongs to."""
        return step // self.blocks

    def over_queries(self, one_block: Callable, carry: Any, queries: Any) -> tuple[Any, Any]:
        """one_block(carry, step, a block of each of `queries` [B, T, …]) -> (carry, results [b, t, …]); the results joined."""
        cut = jax.tree.map(self.cut_queries, queries)
        steps = jnp.arange(self.batch // self.rows * self.blocks, dtype=jnp.int32)
        carry, outs = jax.lax.scan(lambda carry, x: one_block(carry, *x), carry, (steps, cut))
        return carry, jax.tree.map(self.join_queries, outs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledMask:
    """`mask` with its arrays cut, and for each step the chunks [first, end) that hold every key that its queries see."""

    tiles: Tiles = dataclasses.field(metadata={"static": True})
    mask: Mask
    first_i: jax.Array
    end_i: jax.Array

    @classmethod
    def of(cls, tiles: Tiles, mask: Mask) -> "TiledMask":
        q_BT, kv_BS = mask.q_positions_BT, mask.kv_positions_BS
        if mask.ordered and (q_BT is None or kv_BS is None):
            q_T = jnp.arange(tiles.num_queries, dtype=jnp.int32) + (mask.q_offset or 0)
            q_BT = jnp.broadcast_to(q_T, (tiles.batch, tiles.num_queries))
            kv_BS = jnp.broadcast_to(jnp.arange(tiles.num_keys, dtype=jnp.int32), (tiles.batch, tiles.num_keys))
        selected = mask.selected_BTS
        cut = Mask(
            causal=mask.causal,
            window=mask.window,
            q_positions_BT=_maybe(tiles.cut_queries, q_BT, mode="edge"),
            kv_positions_BS=_maybe(tiles.cut_keys, kv_BS, mode="edge"),
            q_segment_ids_BT=_maybe(tiles.cut_queries, mask.q_segment_ids_BT),
            kv_segment_ids_BS=_maybe(tiles.cut_keys, mask.kv_segment_ids_BS),
            selected_BTS=None if selected is None else tiles.cut_queries(_pad(selected, tiles.padded_keys, axis=2)),
        )
        first_i, end_i = _chunk_range(tiles, cut)
        return cls(tiles=tiles, mask=cut, first_i=first_i, end_i=end_i)

    def over_keys(self, step: Any, absorb: Callable, state: Any) -> Any:
        """absorb(start, state) -> state for chunks that hold all keys that the step's queries see."""
        chunk = self.tiles.chunk
        return jax.lax.fori_loop(self.first_i[step], self.end_i[step], lambda c, state: absorb(c * chunk, state), state)

    def visible(self, step: Any, start: Any) -> jax.Array:
        """Bool [b, t, s]: which keys of the chunk at `start` are seen."""
        tiles, mask = self.tiles, self.mask

        def queries(a_ibt: jax.Array | None) -> jax.Array | None:
            return None if a_ibt is None else a_ibt[step]

        def keys(a_gbS: jax.Array | None) -> jax.Array | None:
            return None if a_gbS is None else _slice(a_gbS[tiles.group(step)], start, tiles.chunk, axis=1)

        selected_btS = queries(mask.selected_BTS)
        here = Mask(
            causal=mask.causal,
            window=mask.window,
            q_positions_BT=queries(mask.q_positions_BT),
            kv_positions_BS=keys(mask.kv_positions_BS),
            q_segment_ids_BT=queries(mask.q_segment_ids_BT),
            kv_segment_ids_BS=keys(mask.kv_segment_ids_BS),
            selected_BTS=None if selected_btS is None else _slice(selected_btS, start, tiles.chunk, axis=2),
        )
        visible_bts = here.array(tiles.rows, tiles.block, tiles.chunk)
        if tiles.padded_keys > tiles.num_keys:
            visible_bts &= start + jnp.arange(tiles.chunk, dtype=jnp.int32) < tiles.num_keys
        return visible_bts


def _chunk_range(tiles: Tiles, cut: Mask) -> tuple[jax.Array, jax.Array]:
    """For each step the first chunk with a key that a query may see, and the end; 0 and 0 if there is none."""
    groups = tiles.batch // tiles.rows
    seen_gibc = jnp.ones((groups, tiles.blocks, 1, tiles.chunks), bool)

    def of_queries(ids_ibt: jax.Array, leave_out: int | None = None) -> jax.Array:
        return _extremes(ids_ibt, leave_out).reshape(groups, tiles.blocks, tiles.rows, 1, 2)

    def of_keys(ids_gbS: jax.Array, leave_out: int | None = None) -> jax.Array:
        return _extremes(ids_gbS.reshape(groups, 1, tiles.rows, tiles.chunks, tiles.chunk), leave_out)

    if cut.q_positions_BT is not None and cut.kv_positions_BS is not None:
        seen_gibc &= cut.near(of_queries(cut.q_positions_BT), of_keys(cut.kv_positions_BS))[0]
    if cut.q_segment_ids_BT is not None and cut.kv_segment_ids_BS is not None:
        q, kv = of_queries(cut.q_segment_ids_BT, 0), of_keys(cut.kv_segment_ids_BS, 0)
        seen_gibc &= (kv[..., 0] <= q[..., 1]) & (kv[..., 1] >= q[..., 0])
    seen_ic = seen_gibc.any(2).reshape(-1, tiles.chunks)
    some_i = seen_ic.any(1)
    first_i = jnp.where(some_i, jnp.argmax(seen_ic, axis=1), 0)
    end_i = jnp.where(some_i, tiles.chunks - jnp.argmax(seen_ic[:, ::-1], axis=1), 0)
    return first_i.astype(jnp.int32), end_i.astype(jnp.int32)


def _extremes(ids: jax.Array, leave_out: int | None) -> jax.Array:
    """Least and greatest of the last axis, [..., 2]; the wrong way round where all are left out."""
    limits = jnp.iinfo(ids.dtype)
    least, greatest = (
        (ids, ids)
        if leave_out is None
        else (
            jnp.where(ids == leave_out, limits.max, ids),
            jnp.where(ids == leave_out, limits.min, ids),
        )
    )
    return jnp.stack([least.min(-1), greatest.max(-1)], axis=-1)


def _maybe(fn: Callable[..., jax.Array], a: jax.Array | None, **options: Any) -> jax.Array | None:
    return None if a is None else fn(a, **options)


def _slice(a: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis)


def _pad(a: jax.Array, length: int, axis: int = 1, mode: str = "constant") -> jax.Array:
    missing = length - a.shape[axis]
    return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)], mode) if missing else a
