"""How the Hopper kernels of attention walk over tiles and what they hide in them: rows are queries, or keys over queries."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.hopper import PER_COLUMN, PER_ROW, across, down
from kernels_pallas.flash_attention.ids import Ids
from kernels_pallas.flash_attention.mask import Mask

# Tiles [a, d) cover what a block of rows sees; of these, all its rows see the whole of each in [b, c).
Tiles = tuple[Any, Any, Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """The keys that query t may see as far as numbers tell: t + low <= key < t + high and key < num_keys."""

    low: int | None
    high: int | None
    num_queries: int
    num_keys: int

    @classmethod
    def of(cls, mask: Mask, num_queries: int, num_keys: int) -> "Band":
        offset = mask.q_offset or 0
        return cls(
            low=None if mask.left is None else offset - mask.left,
            high=None if mask.right is None else offset + mask.right + 1,
            num_queries=num_queries,
            num_keys=num_keys,
        )

    @property
    def transposed(self) -> "Band":
        """The queries that see a key, in the place of its keys."""
        return Band(
            low=None if self.high is None else 1 - self.high,
            high=None if self.low is None else 1 - self.low,
            num_queries=self.num_keys,
            num_keys=self.num_queries,
        )

    def key_tiles(self, row: jax.Array, rows: int, keys: int) -> Tiles:
        """Of `keys` each, for queries [row, row + rows)."""
        zero, end = jnp.int32(0), jnp.int32(self.num_keys)
        first, stop, whole_first, whole_stop = zero, end, zero, end
        if self.low is not None:
            first, whole_first = row + self.low, row + (rows - 1 + self.low)
        if self.high is not None:
            stop, whole_stop = row + (rows - 1 + self.high), row + self.high

        def tile_of(key: jax.Array, up: int) -> jax.Array:
            key = jnp.minimum(jnp.maximum(key, zero), end) + up
            return jax.lax.div(key, jnp.full_like(key, keys))

        a = tile_of(first, 0)
        d = jnp.maximum(a, tile_of(stop, keys - 1))
        b = jnp.minimum(jnp.maximum(a, tile_of(whole_first, keys - 1)), d)
        c = jnp.minimum(jnp.maximum(b, tile_of(whole_stop, 0)), d)
        return a, b, c, d


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Of blocks of `rows` over tiles of `columns`.

    What indices let be seen, kernels compute; what segment ids and positions do, `arrays` tell them.
    """

    mask: Mask
    band: Band  # of rows and columns
    ids: Ids  # padded
    rows: int
    columns: int
    by_keys: bool

    @classmethod
    def along_queries(
        cls, mask: Mask, lengths: tuple[int, int], padded: tuple[int, int], rows: int, columns: int
    ) -> "Walk":
        """`lengths` and `padded` lengths of queries and keys, these multiples of `rows` and `columns`."""
        ids = Ids.of(mask, *padded)
        return cls(mask=mask, band=Band.of(mask, *lengths), ids=ids, rows=rows, columns=columns, by_keys=False)

    @classmethod
    def along_keys(
        cls, mask: Mask, lengths: tuple[int, int], padded: tuple[int, int], rows: int, columns: int
    ) -> "Walk":
        """Rows are keys, and padded queries count as such: they add nothing to a key's gradient."""
        band = dataclasses.replace(Band.of(mask, *lengths).transposed, num_keys=padded[0])
        return cls(mask=mask, band=band, ids=Ids.of(mask, *padded), rows=rows, columns=columns, by_keys=True)

    @property
    def kinds(self) -> int:
        """Of ids: none, segments or positions, or both."""
        return sum(a is not None for a in (self.ids.q_segments, self.ids.q_positions))

    @functools.cached_property
    def arrays(self) -> tuple[jax.Array, ...]:
        """Ids of rows and of columns [B, kinds, …] and the Tiles of each block of rows [B, blocks, 4]; () without ids."""
        if not self.kinds:
            return ()
        ids = self.ids
        sides = [
            jnp.stack([a for a in side if a is not None], axis=1)
            for side in ((ids.q_segments, ids.q_positions), (ids.kv_segments, ids.kv_positions))
        ]
        rows, columns = sides[::-1] if self.by_keys else sides
        return rows, columns, self._tiles(rows.shape[0], rows.shape[2] // self.rows, columns.shape[2] // self.columns)

    def _tiles(self, batch: int, blocks: int, tiles: int) -> jax.Array:
        i, j = np.arange(blocks)[:, None], np.arange(tiles)[None]
        sizes = (self.columns, self.rows) if self.by_keys else (self.rows, self.columns)
        some, every = self.ids.seen(self.mask, sizes, (j, i) if self.by_keys else (i, j))
        some, every = (jnp.broadcast_to(seen, (batch, blocks, tiles)) for seen in (some, every))
        a, b, c, d = self._band_by_index.key_tiles(jnp.asarray(i * self.rows, jnp.int32), self.rows, self.columns)
        some &= (a <= j) & (j < d)
        every &= some & (b <= j) & (j < c)

        def first(which: jax.Array, otherwise: Any) -> jax.Array:
            return jnp.where(which.any(-1), which.argmax(-1), otherwise)

        start = first(some, 0)
        end = jnp.maximum(start, tiles - first(some[..., ::-1], tiles))
        whole = first(every, end)
        partly = jnp.minimum(end, first(~every & (j >= whole[..., None]), tiles))
        return jnp.stack([start, whole, partly, end], axis=-1).astype(jnp.int32)

    @property
    def _band_by_index(self) -> Band:
        return self.band if self.ids.q_positions is None else dataclasses.replace(self.band, low=None, high=None)

    # ---- in a kernel, whose `refs` are those of `arrays`

    def tiles(self, b: jax.Array, block: jax.Array, refs: list[Any]) -> Tiles:
        """That a block of rows sees."""
        if not refs:
            return self.band.key_tiles(block * self.rows, self.rows, self.columns)
        # What is loaded has a type of shard_map, with which no loop in a kernel can be traced, and arithmetic sheds it.
        start, whole, partly, end = (refs[2][b, block, i] + 0 for i in range(4))
        return start, whole, partly, end

    def hide(
        self, x: jax.Array, row: jax.Array, tile: jax.Array, tiles: Tiles, value: float, row_ids: Any, column_ids: Any
    ) -> jax.Array:
        """`value` where a row does not see a column, of `x` for rows from `row` on and a tile of columns; ids in buffers."""
        band = self.band
        if not self.kinds and band.low is None and band.high is None and band.num_keys % x.shape[1] == 0:
            return x
        # One loop with a branch, not a loop for each kind of tile: those spill.
        _, whole, partly, _ = tiles
        hide = functools.partial(
            self._hide, row=row, column=tile * x.shape[1], value=value, row_ids=row_ids, column_ids=column_ids
        )
        return jax.lax.cond((tile < whole) | (tile >= partly), hide, lambda x: x, x)

    def _hide(
        self, x: jax.Array, row: jax.Array, column: jax.Array, value: float, row_ids: Any, column_ids: Any
    ) -> jax.Array:
        def of_rows(kind: int) -> jax.Array:
            return plgpu.layout_cast(row_ids[kind], PER_ROW)

        def of_columns(kind: int) -> jax.Array:
            return down(plgpu.layout_cast(column_ids[kind], PER_COLUMN), x.shape)

        # Behind the barrier no compiler computes the columns before the loop and keeps them in registers.
        columns = plgpu.broadcasted_iota(jnp.int32, x.shape[1:], 0, layout=PER_COLUMN)
        columns = down(jax.lax.optimization_barrier(columns), x.shape)
        if self.band.num_keys % x.shape[1]:
            x = jnp.where(columns < self.band.num_keys - column, x, value)
        if self.ids.q_positions is None:
            rows = plgpu.broadcasted_iota(jnp.int32, x.shape[:1], 0, layout=PER_ROW) + (row - column)
        else:
            rows, columns = of_rows(self.kinds - 1), of_columns(self.kinds - 1)
        if self.band.low is not None:
            x = jnp.where(columns >= across(rows + self.band.low, x.shape), x, value)
        if self.band.high is not None:
            x = jnp.where(columns < across(rows + self.band.high, x.shape), x, value)
        if self.ids.q_segments is not None:
            segments = across(of_rows(0), x.shape)
            x = jnp.where(segments == of_columns(0), x, value)
            x = jnp.where(segments != 0, x, value)
        return x
