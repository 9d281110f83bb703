"""How the TPU kernels of grouped products walk over rows.

Rows lie in tiles whose edges know nothing of groups. The grid walks over visits, a tile with a group that has rows in it; from one
to the next a tile or a matrix stays where it is. How many there are is data, and the grid has room for the most: its last steps
pass. (A number of steps that is data could not be interpreted inside `shard_map`.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a vector register
VMEM_BYTES = 56 << 20  # of the 64 MiB that the chips with least have
BUFFER_BYTES = 48 << 20  # of these; the rest is the compiler's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visits:
    """Pairs of a tile of rows and a group with rows in it, in order of rows, the last one repeated to the end.

    A tile without a group is visited once, by group E. With `every_group` it is not, but a group without rows is.
    """

    group_V: jax.Array
    tile_V: jax.Array
    starts_E: jax.Array  # first row of each group and of group E, which has none, and its end

    @property
    def most(self) -> int:
        return self.group_V.shape[0]

    @classmethod
    def of(cls, sizes_E: jax.Array, num_rows: int, tile_rows: int, every_group: bool) -> "Visits":
        groups, tiles = sizes_E.shape[0], pl.cdiv(num_rows, tile_rows)
        ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
        starts_E = ends_E - sizes_E
        first_E = jnp.minimum(starts_E // tile_rows, tiles - 1)
        visits_E = jnp.where(sizes_E > 0, (ends_E - 1) // tile_rows - first_E + 1, int(every_group))
        untouched = pl.cdiv(ends_E[-1:], tile_rows)  # the first tile without a group
        first_E = jnp.concatenate([first_E, untouched])
        visits_E = jnp.concatenate([visits_E, jnp.zeros_like(untouched) if every_group else tiles - untouched])
        until_E = jnp.cumsum(visits_E, dtype=jnp.int32)
        visit_V = jnp.minimum(jnp.arange(tiles + groups, dtype=jnp.int32), until_E[-1] - 1)
        group_V = jnp.sum(visit_V[:, None] >= until_E, axis=1, dtype=jnp.int32)
        tile_V = first_E[group_V] + visit_V - (until_E - visits_E)[group_V]
        starts_E = jnp.concatenate([starts_E, ends_E[-1:], ends_E[-1:]])
        return cls(group_V=group_V, tile_V=tile_V, starts_E=starts_E)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Here:
    """In a kernel: the rows of a tile that belong to the group, [start, end), perhaps beyond the tile's edges."""

    start: jax.Array
    end: jax.Array
    tile_rows: int
    first_of_tile: jax.Array
    first_of_group: jax.Array
    last_of_group: jax.Array

    @classmethod
    def of(cls, visit: jax.Array, group_V: Any, tile_V: Any, starts_E: Any, tile_rows: int) -> "Here":
        group, tile, most = group_V[visit], tile_V[visit], group_V.shape[0]
        before, after = jnp.maximum(visit - 1, 0), jnp.minimum(visit + 1, most - 1)
        return cls(
            start=starts_E[group] - tile * tile_rows,
            end=starts_E[group + 1] - tile * tile_rows,
            tile_rows=tile_rows,
            first_of_tile=(visit == 0) | (tile_V[before] != tile),
            first_of_group=(visit == 0) | (group_V[before] != group),
            last_of_group=(visit == most - 1) | (group_V[after] != group),
        )

    @property
    def some(self) -> jax.Array:
        """Whether there are rows to multiply, and this is no repetition."""
        return (self.start < self.end) & (self.first_of_tile | self.first_of_group)

    @property
    def whole(self) -> jax.Array:
        return (self.start <= 0) & (self.end >= self.tile_rows)


class Operand(NamedTuple):
    """Of `rows_times_matrices`: `index(tile of rows, group, tile of columns, step)` says which block."""

    array: jax.Array
    block: tuple[int | None, ...]
    index: Callable
    memory_space: Any = None


def rows_times_matrices(
    product: Callable,
    operands: list[Operand],
    sizes_E: jax.Array,
    *,
    tile: tuple[int, int],
    shape: tuple[int, int],
    steps: int,
    dtype: Any,
    name: str,
    turned: bool = False,
) -> jax.Array:
    """Rows of `shape` that are sums over `steps` of float32 tiles `product(step, *refs)`; zeros beyond the last group.

    turned: tiles are [columns, rows], and turned back when they are stored.
    """
    visits = Visits.of(sizes_E, shape[0], tile[0], every_group=False)
    groups = sizes_E.shape[0]

    def kernel(group_V, tile_V, starts_E, *refs):
        refs, (y_ref, *sums) = refs[: len(operands)], refs[len(operands) :]
        step = pl.program_id(2)
        here = Here.of(pl.program_id(1), group_V, tile_V, starts_E, tile[0])

        def store(y: jax.Array) -> None:
            y = y.T if turned else y

            @pl.when(here.whole)
            def _():
                y_ref[...] = y.astype(y_ref.dtype)

            @pl.when(~here.whole)
            def _():
                row = jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
                others = jnp.where(here.first_of_tile, 0, y_ref[...])
                y_ref[...] = jnp.where((row >= here.start) & (row < here.end), y.astype(y_ref.dtype), others)

        @pl.when(here.first_of_tile & (here.start >= here.end))  # no group has rows in this tile
        def _():
            y_ref[...] = jnp.zeros(y_ref.shape, y_ref.dtype)

        @pl.when(here.some)
        def _():
            if steps == 1:
                store(product(step, *refs))
                return
            (sums_ref,) = sums

            @pl.when(step == 0)
            def _():
                sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

            sums_ref[...] += product(step, *refs)  # in one place: its code is long
            pl.when(step == steps - 1)(lambda: store(sums_ref[...]))

    def index_map(operand: Operand) -> Callable:
        def index(j, v, k, group_V, tile_V, _):
            if steps > 1:  # for a repetition nothing is fetched
                before = jnp.maximum(v - 1, 0)
                repeated = (v > 0) & (group_V[before] == group_V[v]) & (tile_V[before] == tile_V[v])
                k = jnp.where(repeated, steps - 1, k)
            return operand.index(tile_V[v], jnp.minimum(group_V[v], groups - 1), j, k)

        return index

    return call(
        kernel,
        visits,
        grid=(pl.cdiv(shape[1], tile[1]), visits.most, steps),
        in_specs=[pl.BlockSpec(o.block, index_map(o), memory_space=o.memory_space) for o in operands],
        out_specs=pl.BlockSpec(tile, lambda j, v, k, group_V, tile_V, _: (tile_V[v], j)),
        out_shape=result(shape, dtype, operands[0].array),
        scratch_shapes=[pltpu.VMEM(tile[::-1] if turned else tile, jnp.float32)] * (steps > 1),
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        inner=operands[0].array.shape[1],
        name=name,
    )(*(operand.array for operand in operands))


def call(
    kernel: Callable, visits: Visits, *, inner: int, dimension_semantics: Any, name: str, **arguments: Any
) -> Callable:
    """`pallas_call` over visits; each number of the result, or of the gradient of a matrix, is a sum over at most `inner`."""
    out = arguments.pop("out_shape")

    def run(*operands: jax.Array) -> jax.Array:
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=3, **arguments),
            out_shape=out,
            compiler_params=pltpu.CompilerParams(dimension_semantics=dimension_semantics, vmem_limit_bytes=VMEM_BYTES),
            cost_estimate=pl.CostEstimate(
                flops=2 * inner * out.shape[-2] * out.shape[-1],
                transcendentals=0,
                bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*operands, out)),
            ),
            name=name,
        )(visits.group_V, visits.tile_V, visits.starts_E, *operands)

    return run


def result(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """In shard_map, results vary over the mesh axes that arguments vary over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def keep(x: jax.Array, axis: int, start: Any, end: Any) -> jax.Array:
    """Zeros, whatever was there, outside [start, end) along an axis."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where((index >= start) & (index < end), x, 0)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
