"""How the TPU kernels of attention walk over tiles of scores."""

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
LOG2_E = math.log2(math.e)  # exp2 is the instruction, exp one more product
HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # a logit; not -inf, of which a difference is no number
PASS, PARTLY, WHOLLY = range(3)  # what is visible of a tile
SMEM_BYTES = 768 << 10  # for the list of tiles, of 1 MiB
VMEM_BYTES = 56 << 20  # of the 64 MiB that the chips with least have


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


class Ids(NamedTuple):
    """What a mask compares beside indices, of both sides: arrays, their blocks or their refs."""

    q_segments: Any = None
    kv_segments: Any = None
    q_positions: Any = None
    kv_positions: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
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
    def of(cls, q_BTNK: jax.Array, k_BSZK: jax.Array, v_BSZU: jax.Array, mask: Mask, tile: Tile | None) -> "Plan":
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

    def vary(self, a: jax.Array) -> jax.Array:
        """Inside shard_map, all arguments of a kernel vary over the same mesh axes."""
        missing = tuple(self.varies.varying - jax.typeof(a).manual_axis_type.varying)
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    def result(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.varies)

    @functools.cached_property
    def ids(self) -> Ids:
        """[B, T] and [B, S]; what is padded is in no segment."""
        mask, T, S = self.mask, self.padded_queries, self.padded_keys
        found = Ids()
        if mask.q_segment_ids_BT is not None and mask.kv_segment_ids_BS is not None:
            q, kv = _pad(mask.q_segment_ids_BT, T, 1), _pad(mask.kv_segment_ids_BS, S, 1)
            found = found._replace(q_segments=q.astype(jnp.int32), kv_segments=kv.astype(jnp.int32))
        if mask.ordered and mask.q_positions_BT is not None and mask.kv_positions_BS is not None:
            q, kv = _pad(mask.q_positions_BT, T, 1, mode="edge"), _pad(mask.kv_positions_BS, S, 1, mode="edge")
            found = found._replace(q_positions=q.astype(jnp.int32), kv_positions=kv.astype(jnp.int32))
        return found

    def kinds_by_indices(self) -> np.ndarray:
        """What is visible of each tile [blocks of queries, blocks of keys], as far as indices say."""
        mask, tile = self.mask, self.tile
        i, j = np.arange(self.padded_queries // tile.queries), np.arange(self.padded_keys // tile.keys)
        some_ij, all_ij = np.ones((i.size, j.size), bool), np.ones((i.size, j.size), bool)
        if self.num_keys < self.padded_keys:
            all_ij[:, -1] = False
        if mask.ordered and mask.q_positions_BT is None:
            q_i2 = (mask.q_offset or 0) + i[:, None] * tile.queries + np.array([0, tile.queries - 1])
            kv_j2 = j[:, None] * tile.keys + np.array([0, tile.keys - 1])
            some, every = self._near(q_i2[:, None], kv_j2[None])
            some_ij, all_ij = some_ij & some, all_ij & every
        return np.where(some_ij, np.where(all_ij, WHOLLY, PARTLY), PASS).astype(np.int32)

    def kinds_by_ids(self, q_blocks: np.ndarray, kv_blocks: np.ndarray) -> jax.Array:
        """What is visible of these tiles in each row of the batch [B, tiles], as far as positions and segments say."""

        def extremes(a_BT: jax.Array, size: int, blocks: np.ndarray) -> jax.Array:
            a_Bis = a_BT.reshape(a_BT.shape[0], -1, size)
            return jnp.stack([a_Bis.min(-1), a_Bis.max(-1)], -1)[:, blocks]

        some, every, tile = jnp.ones((self.batch, 1), bool), jnp.ones((self.batch, 1), bool), self.tile
        if self.ids.q_positions is not None:
            q = extremes(self.ids.q_positions, tile.queries, q_blocks)
            kv = extremes(self.ids.kv_positions, tile.keys, kv_blocks)
            some, every = self._near(q, kv)
        if self.ids.q_segments is not None:
            q = extremes(self.ids.q_segments, tile.queries, q_blocks)
            kv = extremes(self.ids.kv_segments, tile.keys, kv_blocks)
            some &= (kv[..., 0] <= q[..., 1]) & (kv[..., 1] >= q[..., 0]) & (q != 0).any(-1) & (kv != 0).any(-1)
            every &= (q == kv).all(-1) & (q[..., 0] == q[..., 1]) & (q[..., 0] != 0)
        return jnp.where(some, jnp.where(every, WHOLLY, PARTLY), PASS).astype(jnp.int32)

    def _near(self, q: Any, kv: Any) -> tuple[Any, Any]:
        """Whether some and whether all keys are near enough, by the least and greatest positions [..., 2] of both sides."""
        some, every = (q[..., 0] == q[..., 0]) & (kv[..., 0] == kv[..., 0]), True
        if self.mask.right is not None:
            some &= kv[..., 0] <= q[..., 1] + self.mask.right
            every &= kv[..., 1] <= q[..., 0] + self.mask.right
        if self.mask.left is not None:
            some &= kv[..., 1] >= q[..., 0] - self.mask.left
            every &= kv[..., 0] >= q[..., 1] - self.mask.left
        return some, every


@dataclasses.dataclass(frozen=True)
class Step:
    """Where the grid stands: in a kernel, and in what places a kernel's blocks."""

    walk: "Walk"
    at: tuple[
        Any, ...
    ]  # row of the batch; head, or head of keys if by keys; tile of the list; and head of the group if by keys
    outer_ref: Any
    code_ref: Any

    @property
    def _code(self) -> Any:
        b, tile, tiles = self.at[0], self.at[2], self.outer_ref.shape[0]
        return self.code_ref[
            tile if self.code_ref.shape[0] == tiles else b * tiles + tile
        ]  # one list, or one for each row

    @property
    def q_block(self) -> Any:
        return self.outer_ref[self.at[2]] if self.walk.by_queries else self._code >> 2

    @property
    def kv_block(self) -> Any:
        return self._code >> 2 if self.walk.by_queries else self.outer_ref[self.at[2]]

    @property
    def head(self) -> Any:
        return self.at[1] if self.walk.by_queries else self.at[1] * self.walk.plan.group + self.at[3]

    @property
    def kv_head(self) -> Any:
        return jax.lax.div(self.at[1], self.walk.plan.group) if self.walk.by_queries else self.at[1]

    @property
    def head_of_group(self) -> Any:
        return self.at[3]

    @property
    def is_very_first(self) -> Any:
        """For these heads."""
        return (self.at[2] == 0) & (self.at[3] == 0)

    @property
    def is_first(self) -> Any:
        """With this block of the side that is walked along."""
        before = self.outer_ref[jnp.maximum(self.at[2] - 1, 0)]
        return ((self.at[2] == 0) | (before != self.outer_ref[self.at[2]])) & (self.at[3] == 0)

    @property
    def is_last(self) -> Any:
        end = self.outer_ref.shape[0] - 1
        after = self.outer_ref[jnp.minimum(self.at[2] + 1, end)]
        return ((self.at[2] == end) | (after != self.outer_ref[self.at[2]])) & (self.at[3] == self.walk.grid[3] - 1)

    def run(self, absorb: Callable[[bool], None]) -> None:
        """absorb(masked) if some of the tile is visible."""
        kind = self._code & 3
        pl.when(kind == PARTLY)(lambda: absorb(True))
        pl.when(kind == WHOLLY)(lambda: absorb(False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Over all tiles in which something is visible, along the queries or along the keys."""

    plan: Plan
    by_queries: bool

    @functools.cached_property
    def tiles(self) -> tuple[jax.Array, jax.Array]:
        """Of each the block walked along, and 4 x the other block + what is visible, for each row if rows differ."""
        plan = self.plan
        kind_ij = plan.kinds_by_indices()
        if not self.by_queries:
            kind_ij = kind_ij.T
        listed_ij = kind_ij != PASS
        listed_ij[:, 0] |= ~listed_ij.any(1)  # every block is written, if with zeros
        outer, inner = (a.astype(np.int32) for a in np.nonzero(listed_ij))
        kinds = jnp.asarray(kind_ij[outer, inner])[None]
        if any(a is not None for a in plan.ids):
            fits = outer.size * (1 + plan.batch) * 4 <= SMEM_BYTES
            blocks = (outer, inner) if self.by_queries else (inner, outer)
            kinds = jnp.minimum(kinds, plan.kinds_by_ids(*blocks) if fits else PARTLY)
        if outer.size * (1 + kinds.shape[0]) * 4 > SMEM_BYTES:
            raise Unsupported(f"flash_attention on TPU: {outer.size} tiles are too many to list; 'xla' lists none")
        # A tile that is passed over keeps the blocks of the last one that was not: nothing is loaded for it.
        last = jax.lax.cummax(jnp.where(kinds != PASS, jnp.arange(outer.size, dtype=jnp.int32), 0), axis=1)
        return jnp.asarray(outer), (jnp.asarray(inner)[last] * 4 + kinds).reshape(-1)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        plan, tiles = self.plan, self.tiles[0].size
        return (plan.batch, plan.heads, tiles, 1) if self.by_queries else (plan.batch, plan.kv_heads, tiles, plan.group)

    def step(self, outer_ref: Any, code_ref: Any) -> Step:
        return Step(self, tuple(pl.program_id(axis) for axis in range(4)), outer_ref, code_ref)

    def _spec(self, shape: tuple[int | None, ...], index: Callable[[Any, Step], tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, *at: index(b, Step(self, (b, *at[:3]), at[3], at[4])))

    def queries(self, width: int) -> pl.BlockSpec:
        return self._spec((None, None, self.plan.tile.queries, width), lambda b, step: (b, step.head, step.q_block, 0))

    def keys(self, width: int) -> pl.BlockSpec:
        return self._spec((None, None, self.plan.tile.keys, width), lambda b, step: (b, step.kv_head, step.kv_block, 0))

    @property
    def per_query(self) -> pl.BlockSpec:
        """Of [B, N, 1, T]."""
        return self._spec((None, None, 1, self.plan.tile.queries), lambda b, step: (b, step.head, 0, step.q_block))

    @property
    def ids(self) -> Ids:
        """The side along the rows of scores in every lane [B, T, LANES], the other along lanes [B, 1, S]."""
        return self._of_sides(
            lambda a: None if a is None else jnp.broadcast_to(a[:, :, None], (*a.shape, LANES)),
            lambda a: None if a is None else a[:, None],
            self.plan.ids,
        )

    @property
    def ids_specs(self) -> Ids:
        def of(a: Any, size: int, along_rows: bool, block: Callable[[Step], Any]) -> pl.BlockSpec | None:
            if a is None:
                return None
            if along_rows:
                return self._spec((None, size, LANES), lambda b, step: (b, block(step), 0))
            return self._spec((None, 1, size), lambda b, step: (b, 0, block(step)))

        q = self.plan.tile.queries, self.by_queries, lambda step: step.q_block
        kv = self.plan.tile.keys, not self.by_queries, lambda step: step.kv_block
        ids = self.plan.ids
        return Ids(of(ids.q_segments, *q), of(ids.kv_segments, *kv), of(ids.q_positions, *q), of(ids.kv_positions, *kv))

    def _of_sides(self, along_rows: Callable, along_lanes: Callable, ids: Ids) -> Ids:
        q, kv = (along_rows, along_lanes) if self.by_queries else (along_lanes, along_rows)
        return Ids(q(ids.q_segments), kv(ids.kv_segments), q(ids.q_positions), kv(ids.kv_positions))

    def call(self, kernel: Callable, *, in_specs: list, products: tuple[int, ...], **arguments: Any) -> Callable:
        """`pallas_call` over the tiles; `products` are the widths of its matrix products, that of q first and of v then."""
        plan, tile, (batch, _, steps, _) = self.plan, self.plan.tile, self.grid
        grid_spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=self.grid,
            in_specs=in_specs,
            out_specs=arguments.pop("out_specs"),
            scratch_shapes=arguments.pop("scratch_shapes"),
        )
        scores = batch * plan.heads * steps * tile.queries * tile.keys
        rows = batch * plan.heads * (steps * tile.keys + plan.padded_queries)
        run = pl.pallas_call(
            kernel,
            grid_spec=grid_spec,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * scores * sum(products),
                transcendentals=scores,
                bytes_accessed=rows * sum(products[:2]) * jnp.dtype(plan.dtype).itemsize,
            ),
            **arguments,
        )
        return functools.partial(run, *map(plan.vary, self.tiles))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Logits of a tile times LOG2_E: [queries, keys], or [keys, queries] if the walk is along keys."""

    walk: Walk
    scale: float
    softcap: float | None

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        s = dot(q, k, 1, 1) if self.walk.by_queries else dot(k, q, 1, 1)
        if self.softcap is None:
            return s * (self.scale * LOG2_E)
        return (self.softcap * LOG2_E) * jnp.tanh(s * (self.scale / self.softcap))

    def slope(self, s: jax.Array) -> jax.Array | float:
        """Of the cap."""
        return 1.0 if self.softcap is None else 1 - jnp.square(s * (1 / (self.softcap * LOG2_E)))

    def hide(self, s: jax.Array, ids: Ids, step: Step, keys: slice) -> jax.Array:
        """HIDDEN where a query does not see a key; `keys` are those of the block that `s` holds."""
        plan, mask, conditions = self.walk.plan, self.walk.plan.mask, []
        q_axis, kv_axis = (0, 1) if self.walk.by_queries else (1, 0)

        def of_queries(ref: Any) -> jax.Array:
            return lanes(ref[...], s.shape[1]) if q_axis == 0 else ref[...]

        def of_keys(ref: Any) -> jax.Array:
            return lanes(ref[keys, :], s.shape[1]) if kv_axis == 0 else ref[:, keys]

        kv = jax.lax.broadcasted_iota(jnp.int32, s.shape, kv_axis)
        kv_start = step.kv_block * plan.tile.keys + keys.start
        if plan.num_keys < plan.padded_keys:
            conditions.append(kv < plan.num_keys - kv_start)
        if mask.ordered:
            if ids.q_positions is None:
                distance = kv - jax.lax.broadcasted_iota(jnp.int32, s.shape, q_axis)
                ahead = (mask.q_offset or 0) + step.q_block * plan.tile.queries - kv_start
            else:
                distance, ahead = of_keys(ids.kv_positions) - of_queries(ids.q_positions), 0
            if mask.right is not None:
                conditions.append(distance <= mask.right + ahead)
            if mask.left is not None:
                conditions.append(distance >= ahead - mask.left)
        if ids.q_segments is not None:
            q = of_queries(ids.q_segments)
            conditions.append((of_keys(ids.kv_segments) == q) & (q != 0))
        return jnp.where(functools.reduce(jnp.logical_and, conditions), s, HIDDEN) if conditions else s


def lanes(a: jax.Array, width: int) -> jax.Array:
    """[rows, width] of what is the same in each of LANES lanes."""
    return jnp.tile(a, (1, math.ceil(width / LANES)))[:, :width]


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _ceil(length: int, size: int) -> int:
    return math.ceil(length / size) * size


def _even(length: int, most: int) -> int:
    """Size of as few equal parts of at most `most` as hold `length`."""
    return _ceil(math.ceil(length / math.ceil(length / most)), LANES)


def _pad(a: jax.Array, length: int, axis: int, **how: Any) -> jax.Array:
    missing = length - a.shape[axis]
    return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)], **how) if missing else a
