"""How the TPU kernels of attention walk over tiles of scores."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.ids import Ids
from kernels_pallas.flash_attention.tpu_plan import LANES, PARTLY, PASS, WHOLLY, Plan
from kernels_pallas.select import Unsupported

LOG2_E = math.log2(math.e)  # exp2 is the instruction, exp one more product
HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # a logit; not -inf, of which a difference is no number
SMEM_BYTES = 768 << 10  # for the list of tiles, of 1 MiB
VMEM_BYTES = 56 << 20  # of the 64 MiB that the chips with least have


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
