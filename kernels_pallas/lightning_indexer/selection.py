"""Selection of keys a block of queries at a time: scores come from plain JAX or from a kernel, the choice is the same."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.lightning_indexer import topk as choice
from kernels_pallas.lightning_indexer.tiles import TiledMask, Tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Those of all padded keys, a block of queries at a time."""

    tiled_mask: TiledMask
    queries: tuple[jax.Array, ...]  # [B, T, …], what a block's scores are made of
    # (step, a block of each of the queries) -> sortable int32 [b, t, S], HIDDEN where a query does not see a key
    of_block: Callable[..., jax.Array]

    def choose(self, topk: int) -> jax.Array:
        """The chosen keys [B, T, W], ascending, S for what is missing."""
        tiles = self.tiled_mask.tiles

        def chosen(step: Any, key_btS: jax.Array) -> jax.Array:
            key_RS = key_btS.reshape(-1, tiles.padded_keys)

            def over_pieces(absorb: Callable, state: Any) -> Any:
                def one_piece(start: Any, state: Any) -> Any:
                    return absorb(jax.lax.dynamic_slice_in_dim(key_RS, start, tiles.chunk, 1), state)

                return self.tiled_mask.over_keys(step, one_piece, state)

            index_RW = jnp.minimum(choice.largest(key_RS, topk, over_pieces), tiles.num_keys)
            return index_RW.reshape(tiles.rows, tiles.block, topk)

        return self.over_blocks(chosen)

    def over_blocks(self, run: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
        """run(step, scores of a block) -> [b, t, …]; the results of all, [B, T, …]."""

        def one_block(carry: tuple[()], step: Any, queries: tuple[jax.Array, ...]) -> tuple[tuple[()], jax.Array]:
            return carry, run(step, self.of_block(step, *queries))

        return self.tiled_mask.tiles.over_queries(one_block, (), self.queries)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sight:
    """Which keys a query sees, by ids: positions and segments, in this order those of them that the mask has."""

    left: int | None
    right: int | None
    positions: bool
    segments: bool
    num_keys: int | None  # None if no key is padding

    @property
    def kinds(self) -> int:
        """Of ids."""
        return self.positions + self.segments

    def __call__(self, q_ids: list[Any], kv_ids: list[Any], place: Any) -> Any | None:
        """Whether queries see keys, of ids and the keys' places that broadcast; None if all see all."""
        conditions = []
        if self.num_keys is not None:
            conditions.append(place < self.num_keys)
        if self.positions and self.right is not None:
            conditions.append(kv_ids[0] <= q_ids[0] + self.right)
        if self.positions and self.left is not None:
            conditions.append(kv_ids[0] >= q_ids[0] - self.left)
        if self.segments:
            conditions += [kv_ids[-1] == q_ids[-1], kv_ids[-1] != 0]
        return functools.reduce(operator.and_, conditions) if conditions else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a kernel scores: a block of queries of some rows, of the keys of all R rows."""

    q_btIJ: jax.Array
    w_btI: jax.Array
    q_ids: jax.Array | None  # int32 [b, kinds, t]
    k_RSJ: jax.Array
    k_scale_RS: jax.Array | None
    kv_ids: jax.Array | None  # int32 [R, kinds, S]
    span: jax.Array  # int32 [3]: where the block's rows begin in R; the first tile of keys that it sees, and the end
    sight: Sight


def scores_by(
    kernel: Callable[[Work], jax.Array],
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    k_BSJ: jax.Array,
    k_scale_BS: jax.Array | None,
    mask: Mask,
    *,
    keys: int,
) -> Scores:
    """Sortable scores [b, t, S] that a kernel makes; `keys` are a tile of it.

    A selection among the keys is not for kernels: what it hides is hidden afterwards.
    """
    tiles = Tiles.of(q_BTIJ, k_BSJ, q_BTIJ.shape[2], multiple=keys)
    tiled_mask = TiledMask.of(tiles, mask)
    by_tile = TiledMask.of(dataclasses.replace(tiles, chunk=keys, chunks=tiles.padded_keys // keys), mask)
    cut = tiled_mask.mask
    sight = Sight(
        left=cut.left,
        right=cut.right,
        positions=mask.ordered,
        segments=cut.q_segment_ids_BT is not None,
        num_keys=tiles.num_keys if tiles.padded_keys > tiles.num_keys else None,
    )
    q_ids = _stack(cut.q_positions_BT if mask.ordered else None, cut.q_segment_ids_BT)
    kv_ids = _stack(cut.kv_positions_BS if mask.ordered else None, cut.kv_segment_ids_BS)
    k_RSJ, k_scale_RS, kv_ids = jax.tree.map(
        lambda a: a.reshape(-1, *a.shape[2:]), (tiles.cut_keys(k_BSJ), _maybe_cut(tiles, k_scale_BS), kv_ids)
    )

    def of_block(step: Any, q_btIJ: jax.Array, w_btI: jax.Array) -> jax.Array:
        work = Work(
            q_btIJ=q_btIJ,
            w_btI=w_btI,
            q_ids=None if q_ids is None else q_ids[step],
            k_RSJ=k_RSJ,
            k_scale_RS=k_scale_RS,
            kv_ids=kv_ids,
            span=jnp.stack([tiles.group(step) * tiles.rows, by_tile.first_i[step], by_tile.end_i[step]]),
            sight=sight,
        )
        key_btS = kernel(work)
        return key_btS if cut.selected_BTS is None else jnp.where(cut.selected_BTS[step], key_btS, choice.HIDDEN)

    return Scores(tiled_mask=tiled_mask, queries=(q_BTIJ, w_BTI), of_block=of_block)


def _stack(*ids: jax.Array | None) -> jax.Array | None:
    """[steps, b, kinds, …]"""
    there = [a.astype(jnp.int32) for a in ids if a is not None]
    return jnp.stack(there, axis=2) if there else None


def _maybe_cut(tiles: Tiles, a_BS: jax.Array | None) -> jax.Array | None:
    return None if a_BS is None else tiles.cut_keys(a_BS)
