"""What the Hopper kernels of grouped products share: tiles of a result, taken in turns by as many blocks of threads as run at once.

One warpgroup brings operands by TMA, on to the next tile while two compute, each 64 rows of a tile. A tile has rows of one group
only; where a group ends within, as many rows are stored as it has, in pieces of 32, 16, … 1: TMA has no masks.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.hopper import (
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    WARPGROUPS,
    compiler_params,
    pad,
)
from kernels_pallas.vary import vary_alike

BLOCKS = 132  # of threads: the multiprocessors of an H100 or H200
TILE_ROWS = WARPGROUPS * ROWS
SWIZZLE = 128  # bytes
PART = 64  # columns of a result, 16-bit numbers, that are stored at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visits:
    """Tiles of 128 rows of one group, from `row_V` on, or fewer up to `end_V`; those beyond the last group are of group E."""

    group_V: jax.Array
    row_V: jax.Array
    end_V: jax.Array
    count: jax.Array  # [1]; behind it, anything

    @classmethod
    def of(cls, sizes_E: jax.Array, num_rows: int) -> "Visits":
        sizes_E = jnp.concatenate([sizes_E, num_rows - jnp.sum(sizes_E, keepdims=True, dtype=jnp.int32)])
        ends_E, tiles_E = jnp.cumsum(sizes_E, dtype=jnp.int32), pl.cdiv(sizes_E, TILE_ROWS)
        until_E = jnp.cumsum(tiles_E, dtype=jnp.int32)
        visit_V = jnp.arange(num_rows // TILE_ROWS + len(sizes_E), dtype=jnp.int32)
        group_V = jnp.minimum(jnp.sum(visit_V[:, None] >= until_E, axis=1, dtype=jnp.int32), len(sizes_E) - 1)
        row_V = (ends_E - sizes_E)[group_V] + TILE_ROWS * (visit_V - (until_E - tiles_E)[group_V])
        return cls(group_V=group_V, row_V=row_V, end_V=ends_E[group_V], count=until_E[-1:])


@dataclasses.dataclass(frozen=True)
class Staging:
    """In a kernel: where results lie on their way from registers, PART columns at a time."""

    tiled_smem: Any  # [warpgroups, 64, PART]
    plain_smem: Any  # the same for TMA in single rows

    def store_whole(self, y: jax.Array, target: Any, first_row: jax.Array) -> None:
        own = self.tiled_smem.at[jax.lax.axis_index("warpgroup")]
        own[...] = y
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, target.at[pl.ds(first_row, ROWS)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def store(self, y: jax.Array, target: Any, first_row: jax.Array, start: jax.Array, end: jax.Array) -> None:
        """Rows [start, end) of y, whose first belongs to `first_row`."""
        is_whole = end - start == ROWS
        pl.when(is_whole)(lambda: self.store_whole(y, target, first_row))

        @pl.when(jnp.logical_not(is_whole) & (end > start))
        def _():
            own = self.plain_smem.at[jax.lax.axis_index("warpgroup")]
            put(own, y)
            plgpu.commit_smem()
            for log in reversed(range(int(math.log2(ROWS)))):
                size = 1 << log
                # Behind the larger pieces.
                at = start + ((end - start) & ~(2 * size - 1))

                @pl.when((end - start) & size != 0)
                def _(at=at, size=size):
                    plgpu.copy_smem_to_gmem(own.at[pl.ds(at, size)], target.at[pl.ds(first_row + at, size)])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def put(ref: Any, y: jax.Array) -> None:
    """ref[...] = y where that makes bank conflicts, which newer versions of JAX want to be told; their interpreter does not."""
    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = y
    else:
        store(ref, y, optimized=False)


@dataclasses.dataclass(frozen=True)
class Ring:
    """In a kernel: places for the operands of so many steps, which TMA fills and both warpgroups empty."""

    stages: int
    here: Any  # barriers
    free: Any

    def slot(self, step: jax.Array) -> jax.Array:
        return jax.lax.rem(step, jnp.int32(self.stages))

    def await_free(self, step: jax.Array) -> None:
        pl.when(step >= self.stages)(lambda: plgpu.barrier_wait(self.free.at[self.slot(step)]))

    def await_here(self, step: jax.Array) -> None:
        plgpu.barrier_wait(self.here.at[self.slot(step)])

    def release(self, step: jax.Array) -> None:
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def take_turns(
    ring: Ring, items: jax.Array, *, steps_of: Callable, bring: Callable, sum_of: Callable, store: Callable
) -> None:
    """In a kernel: every BLOCKS-th of `items`, each a number of steps.

    `bring(item, step of it, slot, barrier)` starts the copies of a step, `sum_of(item, steps, the first step's number)` awaits and
    releases them, and `store(item, sum)` ends an item.
    """
    w, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")
    turns = jax.lax.div(items - block + (BLOCKS - 1), jnp.int32(BLOCKS))

    def each(run: Callable) -> None:
        def turn(t, done):
            item = block + t * BLOCKS
            steps = steps_of(item)
            run(item, steps, done)
            return done + steps

        jax.lax.fori_loop(0, turns, turn, jnp.int32(0))

    @pl.when(w == WARPGROUPS)
    def _bring():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        def bring_all(item, steps, done):
            def step(i, _):
                ring.await_free(done + i)
                slot = ring.slot(done + i)
                bring(item, i, slot, ring.here.at[slot])
                return ()

            jax.lax.fori_loop(0, steps, step, ())

        each(bring_all)

    @pl.when(w < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(REGISTERS, action="increase")
        each(lambda item, steps, done: store(item, sum_of(item, steps, done)))
        plgpu.wait_smem_to_gmem(0)


def kernel(body: Callable, *, out_type: Any, operands: list[Any], copies: int, dtype: Any, stages: int) -> Callable:
    """`body(*arguments, result, *operands, staging, ring)`; `copies` bring a step."""

    def run(*refs):
        *refs, tiled, plain, here, free = refs
        body(*refs, Staging(tiled, plain), Ring(stages, here, free))

    run.__name__ = body.__name__
    call = plgpu.kernel(
        run,
        out_type=out_type,
        scratch_types=[
            *operands,
            smem((WARPGROUPS, ROWS, PART), dtype),
            plgpu.SMEM((WARPGROUPS, ROWS, PART), dtype),
            plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
            plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        ],
        grid=(BLOCKS,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
    )
    return lambda *args: vary_alike((call(*args), args[0]))[0]  # which kernels leave out of their result's type


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """As TMA writes and wgmma reads it; the last dim is a multiple of 128 bytes."""
    tiling = plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(SWIZZLE)))


def at_least(a: jax.Array, axis: int, length: int) -> jax.Array:
    """Zeros behind, up to the length of a tile, and to eights beyond: TMA takes no less of what it swizzles."""
    return pad(a, axis, length if a.shape[axis] < length else 8)
