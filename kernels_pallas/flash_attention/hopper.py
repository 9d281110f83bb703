"""What the Hopper kernels of `flash_attention` share."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.select import Unsupported

ROWS = 64  # of a warpgroup: what an instruction multiplies
WARPGROUPS = 2  # that compute
SHARED_MEMORY = 227 * 1024  # bytes that a block of threads may have
# A thread, of a computing warpgroup and of the one that brings: together what three warpgroups start with, 3 x 168. One more, and
# the threads would wait for it forever.
REGISTERS, PRODUCER_REGISTERS = 240, 24
WIDTH = 64  # widths are multiples of it: 16-bit numbers in 128 bytes, the swizzle
WIDEST = 256
LOG2_E = math.log2(math.e)
TILE, PER_ROW, PER_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def check(q_BTNK: jax.Array, v_BSZU: jax.Array, mask: Mask, scale: float) -> None:
    """Raises Unsupported."""
    lacks = None
    if q_BTNK.dtype not in (jnp.bfloat16, jnp.float16):
        lacks = f"has no {q_BTNK.dtype}, only bfloat16 and float16"
    elif max(q_BTNK.shape[3], v_BSZU.shape[3]) > WIDEST:
        lacks = f"has no widths above {WIDEST}: these are {q_BTNK.shape[3]} and {v_BSZU.shape[3]}"
    elif mask.q_positions_BT is not None:
        lacks = "has no masks by positions; give q_offset"
    elif mask.selected_BTS is not None:
        lacks = "has no masks by selection"
    elif not scale > 0:
        lacks = f"needs a positive scale, not {scale}"
    if lacks is not None:
        raise Unsupported(f"flash_attention on gpu {lacks}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """The keys that query t may see as far as indices tell: t + low <= key < t + high and key < num_keys."""

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

    def key_tiles(self, row: jax.Array, rows: int, keys: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Tiles of keys [a, d) cover what queries [row, row + rows) see; of these, all see the whole of each in [b, c)."""
        zero, end = jnp.int32(0), jnp.int32(self.num_keys)
        first, stop, whole_first, whole_stop = zero, end, zero, end
        if self.low is not None:
            first, whole_first = row + self.low, row + (rows - 1 + self.low)
        if self.high is not None:
            stop, whole_stop = row + (rows - 1 + self.high), row + self.high

        def tile_of(key: jax.Array, up: int) -> jax.Array:
            return jax.lax.div(jnp.minimum(jnp.maximum(key, zero), end) + up, jnp.int32(keys))

        a = tile_of(first, 0)
        d = jnp.maximum(a, tile_of(stop, keys - 1))
        b = jnp.minimum(jnp.maximum(a, tile_of(whole_first, keys - 1)), d)
        c = jnp.minimum(jnp.maximum(b, tile_of(whole_stop, 0)), d)
        return a, b, c, d

    def hide(
        self, x: jax.Array, row: jax.Array, tile: jax.Array, tiles: tuple[jax.Array, ...], value: float
    ) -> jax.Array:
        """`value` where a query does not see a key, of `x` for queries from `row` on and a tile of keys."""
        if self.low is None and self.high is None and self.num_keys % x.shape[1] == 0:
            return x
        # One loop with a branch, not a loop for each kind of tile: those spill.
        _, whole, partly, _ = tiles
        hide = functools.partial(self._hide, row=row, key=tile * x.shape[1], value=value)
        return jax.lax.cond((tile < whole) | (tile >= partly), hide, lambda x: x, x)

    def _hide(self, x: jax.Array, row: jax.Array, key: jax.Array, value: float) -> jax.Array:
        rows = plgpu.broadcasted_iota(jnp.int32, x.shape[:1], 0, layout=PER_ROW)
        columns = plgpu.broadcasted_iota(jnp.int32, x.shape[1:], 0, layout=PER_COLUMN)
        # Behind the barrier no compiler computes the columns before the loop and keeps them in registers.
        columns = down(jax.lax.optimization_barrier(columns), x.shape)
        if self.low is not None:
            x = jnp.where(columns >= across(rows + (row - key + self.low), x.shape), x, value)
        if self.high is not None:
            x = jnp.where(columns < across(rows + (row - key + self.high), x.shape), x, value)
        if self.num_keys % x.shape[1]:
            x = jnp.where(columns < self.num_keys - key, x, value)
        return x


def segment_ids(mask: Mask, rows: int, keys: int) -> tuple[jax.Array, ...]:
    """Those of queries and keys, padded to multiples of `rows` and `keys`; () if there are none."""
    if mask.q_segment_ids_BT is None or mask.kv_segment_ids_BS is None:
        return ()
    both = ((mask.q_segment_ids_BT, rows), (mask.kv_segment_ids_BS, keys))
    return tuple(pad(ids.astype(jnp.int32), 1, size) for ids, size in both)


def hide_other_segments(x: jax.Array, ids: jax.Array, ids_smem: Any, value: float) -> jax.Array:
    """`value` where the id of the row, in registers, is not that of the column, in a buffer, or 0."""
    column_ids = plgpu.layout_cast(ids_smem[...], PER_COLUMN)
    x = jnp.where(across(ids, x.shape) == down(column_ids, x.shape), x, value)
    return jnp.where(across(ids, x.shape) != 0, x, value)


def pad(a: jax.Array, axis: int, multiple: int, value: float = 0) -> jax.Array:
    """TMA takes no partial tiles of a swizzled buffer."""
    missing = -a.shape[axis] % multiple
    widths = [(0, missing if i == axis else 0) for i in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value) if missing else a


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """As TMA writes and wgmma reads it; the last dim is a multiple of WIDTH."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH)))


def full(shape: tuple[int, ...], value: Any, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def across(per_row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcast_in_dim(per_row, shape, (0,))


def down(per_column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcast_in_dim(per_column, shape, (1,))


def tanh(x: jax.Array) -> jax.Array:
    """To an absolute error of float32; the instruction has that of bfloat16."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2_E)))


def multiply(a: Any, b: Any) -> jax.Array:
    """a b of buffers, waiting for the result."""

    def run(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def add_product(sums: jax.Array, a: Any, b: Any, a_smem: Any | None) -> Any:
    """sums + a b, with `a` from registers or by way of a buffer."""
    if a_smem is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.WGMMAAccumulatorRef.init(sums))
    a_smem[...] = a
    plgpu.commit_smem()
    return sums + multiply(a_smem, b)


def subtract_from_product(a: Any, b: Any, x: jax.Array, inside: bool) -> Any:
    """a b - x of buffers `a` and `b`; `inside` the instruction, where sums then take no registers beside `x`."""
    if not inside:
        return multiply(a, b) - x
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.WGMMAAccumulatorRef.init(-x))


def compiler_params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
