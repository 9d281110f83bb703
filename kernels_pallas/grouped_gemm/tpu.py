"""The grouped products as Mosaic TPU kernels, after MegaBlox (arXiv 2211.15841).

Rows lie in tiles whose edges know nothing of groups. The grid walks over visits, a tile with a group that has rows in it; from one
to the next a tile or a matrix stays where it is. How many there are is data, and the grid has room for the most: its last steps
pass. (A number of steps that is data could not be interpreted inside `shard_map`.)

JAX's own megablox is not behind this: it cannot run inside a `shard_map` that checks types, takes rows in whole tiles only, leaves
rows beyond the last group as they were, and multiplies what they hold into gradients.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.select import Unsupported

LANES = 128  # of a vector register
SUBLANES = 16  # of a tile of 16-bit numbers
VMEM_BYTES = 56 << 20  # of the 64 MiB that the chips with least have
BUFFER_BYTES = 48 << 20  # of these; the rest is the compiler's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one step multiplies: [rows, inner] by [inner, columns]; for weights, [rows, inner]^T by [rows, columns]."""

    rows: int
    inner: int
    columns: int


def choose(rows: int, inner: int, columns: int, groups: int, itemsize: int) -> Tile:
    """All of the contraction at once while that fits: then each matrix is read once for every block of its columns."""
    tile_rows = min(512, max(LANES, 1 << math.ceil(math.log2(rows / groups))), _ceil(rows, SUBLANES))
    tile_columns = _even(columns, 1024)
    for steps in range(1, 1 + math.ceil(inner / LANES)):
        tile_inner = inner if steps == 1 else _ceil(math.ceil(inner / steps), LANES)
        operands = 2 * itemsize * (tile_inner * (tile_rows + tile_columns) + tile_rows * tile_columns)
        if operands + 8 * tile_rows * tile_columns <= BUFFER_BYTES:
            break
    return Tile(rows=tile_rows, inner=tile_inner, columns=tile_columns)


def choose_weights(rows: int, inner: int, columns: int, groups: int) -> Tile:
    tile_rows = min(512, max(LANES, 1 << math.ceil(math.log2(rows / groups))), _ceil(rows, SUBLANES))
    return Tile(rows=tile_rows, inner=_even(inner, 1024), columns=_even(columns, 1024))


def forward(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, tile: Tile | None = None) -> jax.Array:
    """y_MF = x_MD @ w[group], in x's dtype; zeros beyond the last group. Raises Unsupported."""
    return _rows_times_matrices(x_MD, w_EDF, sizes_E, tile, transpose=False)


def backward_rows(dy_MF: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, tile: Tile | None = None) -> jax.Array:
    """dx_MD = dy_MF @ w[group]^T, in dy's dtype; the matrices are read as they lie. Raises Unsupported."""
    return _rows_times_matrices(dy_MF, w_EDF, sizes_E, tile, transpose=True)


def _rows_times_matrices(
    x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, tile: Tile | None, transpose: bool
) -> jax.Array:
    _check(x_MD, w_EDF)
    rows, inner = x_MD.shape
    groups, columns = w_EDF.shape[0], w_EDF.shape[1 if transpose else 2]
    tile = tile or choose(rows, inner, columns, groups, x_MD.dtype.itemsize)
    visits = Visits.of(sizes_E, rows, tile.rows, every_group=False)
    steps = pl.cdiv(inner, tile.inner)

    def kernel(group_V, tile_V, starts_E, x_ref, w_ref, y_ref, *sums_ref):
        step = pl.program_id(2)
        here = Here.of(pl.program_id(1), group_V, tile_V, starts_E, tile.rows)

        def product() -> jax.Array:
            x, w = x_ref[...], w_ref[...]
            if inner % tile.inner:
                left = inner - step * tile.inner
                x, w = _keep(x, 1, 0, left), _keep(w, 1 if transpose else 0, 0, left)
            return _dot(x, w, 1, 1 if transpose else 0)

        def store(y: jax.Array) -> None:
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
                store(product())
                return
            (sums,) = sums_ref

            @pl.when(step == 0)
            def _():
                sums[...] = product()

            @pl.when((step > 0) & (step < steps - 1))
            def _():
                sums[...] += product()

            @pl.when(step == steps - 1)
            def _():
                store(sums[...] + product())

    def w_index(j, v, k, group_V, tile_V, _):
        group, k = jnp.minimum(group_V[v], groups - 1), inner_index(v, k, group_V, tile_V)
        return (group, j, k) if transpose else (group, k, j)

    def inner_index(v, k, group_V, tile_V):
        if steps == 1:
            return 0
        before = jnp.maximum(v - 1, 0)
        repeated = (v > 0) & (group_V[before] == group_V[v]) & (tile_V[before] == tile_V[v])
        return jnp.where(repeated, steps - 1, k)  # and nothing is fetched

    def x_index(j, v, k, group_V, tile_V, _):
        return tile_V[v], inner_index(v, k, group_V, tile_V)

    w_block = (tile.columns, tile.inner) if transpose else (tile.inner, tile.columns)
    return _call(
        kernel,
        visits,
        grid=(pl.cdiv(columns, tile.columns), visits.most, steps),
        in_specs=[pl.BlockSpec((tile.rows, tile.inner), x_index), pl.BlockSpec((None, *w_block), w_index)],
        out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda j, v, k, group_V, tile_V, _: (tile_V[v], j)),
        out_shape=_result((rows, columns), x_MD.dtype, x_MD),
        scratch_shapes=[pltpu.VMEM((tile.rows, tile.columns), jnp.float32)] * (steps > 1),
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        flops=2 * rows * inner * columns,
        name="grouped_gemm_backward_rows" if transpose else "grouped_gemm",
    )(x_MD, w_EDF)


def backward_weights(
    x_MD: jax.Array, dy_MF: jax.Array, sizes_E: jax.Array, dtype: Any, tile: Tile | None = None
) -> jax.Array:
    """dw_EDF[e] = x_e^T dy_e over the rows of group e; zeros for an empty group. Raises Unsupported."""
    _check(x_MD, dy_MF)
    (rows, inner), columns, groups = x_MD.shape, dy_MF.shape[1], sizes_E.shape[0]
    tile = tile or choose_weights(rows, inner, columns, groups)
    visits = Visits.of(sizes_E, rows, tile.rows, every_group=True)

    def kernel(group_V, tile_V, starts_E, x_ref, dy_ref, dw_ref, sums_ref):
        here = Here.of(pl.program_id(2), group_V, tile_V, starts_E, tile.rows)

        @pl.when(here.first_of_group)
        def _():
            sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

        @pl.when(here.some & here.whole)
        def _():
            sums_ref[...] += _dot(x_ref[...], dy_ref[...], 0, 0)

        @pl.when(here.some & ~here.whole)
        def _():
            x, dy = (_keep(ref[...], 0, here.start, here.end) for ref in (x_ref, dy_ref))
            sums_ref[...] += _dot(x, dy, 0, 0)

        @pl.when(here.last_of_group)
        def _():
            dw_ref[...] = sums_ref[...].astype(dw_ref.dtype)

    def rows_spec(width: int, axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((tile.rows, width), lambda i, j, v, group_V, tile_V, _: (tile_V[v], (i, j)[axis]))

    return _call(
        kernel,
        visits,
        grid=(pl.cdiv(inner, tile.inner), pl.cdiv(columns, tile.columns), visits.most),
        in_specs=[rows_spec(tile.inner, 0), rows_spec(tile.columns, 1)],
        out_specs=pl.BlockSpec((None, tile.inner, tile.columns), lambda i, j, v, group_V, *_: (group_V[v], i, j)),
        out_shape=_result((groups, inner, columns), dtype, x_MD),
        scratch_shapes=[pltpu.VMEM((tile.inner, tile.columns), jnp.float32)],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        flops=2 * rows * inner * columns,
        name="grouped_gemm_backward_weights",
    )(x_MD, dy_MF)


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


def _call(kernel: Callable, visits: Visits, **arguments: Any) -> Callable:
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        **{name: arguments.pop(name) for name in ("grid", "in_specs", "out_specs", "scratch_shapes")},
    )
    out = arguments["out_shape"]

    def run(*operands: jax.Array) -> jax.Array:
        num_bytes = sum(a.size * a.dtype.itemsize for a in (*operands, out))
        return pl.pallas_call(
            kernel,
            grid_spec=grid_spec,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=arguments.pop("dimension_semantics"), vmem_limit_bytes=VMEM_BYTES
            ),
            cost_estimate=pl.CostEstimate(flops=arguments.pop("flops"), transcendentals=0, bytes_accessed=num_bytes),
            **arguments,
        )(visits.group_V, visits.tile_V, visits.starts_E, *operands)

    return run


def _check(a: jax.Array, b: jax.Array) -> None:
    if a.dtype != b.dtype or a.dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(f"grouped_gemm on TPU takes bfloat16 or float32, not {a.dtype} and {b.dtype}; 'xla' does")


def _result(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """In shard_map, results vary over the mesh axes that arguments vary over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _keep(x: jax.Array, axis: int, start: Any, end: Any) -> jax.Array:
    """Zeros, whatever was there, outside [start, end) along an axis."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where((index >= start) & (index < end), x, 0)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _ceil(length: int, size: int) -> int:
    return math.ceil(length / size) * size


def _even(length: int, most: int) -> int:
    """Size of as few equal parts of at most `most` as hold `length`, in whole registers; the length itself if it is one part."""
    return length if length <= most else _ceil(math.ceil(length / math.ceil(length / most)), LANES)
