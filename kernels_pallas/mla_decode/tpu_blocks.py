"""How blocks of the cache come into VMEM for the TPU kernel of decoding: those that hold something, each before it is needed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mla_decode.cache import AnyCache, LatentCache, capacity
from kernels_pallas.select import Unsupported

LANES = 128  # of a vector register
MOST_PAGE = 4096  # slots, of which VMEM holds two pages
SMEM_BYTES = 768 << 10  # for lengths and page numbers, of 1 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Of all rows. Each row's blocks are dealt evenly to the splits; the grid is splits by rows.

    Rotary keys and FP8 rows are read with slots along lanes: so XLA stores an array whose last dim is no multiple of LANES, and in
    any other order each call would copy the cache.
    """

    cache: AnyCache
    batch: int
    splits: int
    slots: int  # of a block

    @classmethod
    def of(cls, cache: AnyCache, batch: int, splits: int, most_slots: int) -> "Blocks":
        slots, table = cache.arrays[0].shape[1], cache.page_table_BP
        if table is None:
            return cls(cache=cache, batch=batch, splits=splits, slots=min(most_slots, _whole(slots)))
        if slots % LANES or slots > MOST_PAGE:
            sizes = f"{LANES} to {MOST_PAGE} slots, by {LANES}"
            raise Unsupported(
                f"mla_decode on TPU takes pages of {sizes}, not {slots}: each call would copy smaller ones"
            )
        if 4 * (batch + table.size) > SMEM_BYTES:
            raise Unsupported(f"mla_decode on TPU has no room for {table.size} page numbers; 'xla' does")
        return cls(cache=cache, batch=batch, splits=splits, slots=max(most_slots // slots, 1) * slots)

    def scalars(self, lengths_B: jax.Array) -> list[jax.Array]:
        """What rows hold, and the numbers of their pages one row after the other."""
        held_B = jnp.clip(lengths_B, 0, capacity(self.cache)).astype(jnp.int32)
        if self.cache.page_table_BP is None:
            return [held_B]
        pages = self.cache.arrays[0].shape[0]
        return [held_B, jnp.clip(self.cache.page_table_BP, 0, pages - 1).astype(jnp.int32).reshape(-1)]

    @property
    def arrays(self) -> list[jax.Array]:
        """[…, slots, C], or […, width, slots] of what has its slots along lanes; contiguous ones padded to whole registers."""
        missing = -self.cache.arrays[0].shape[1] % LANES
        padded = [jnp.pad(a, ((0, 0), (0, missing), (0, 0))) if missing else a for a in self.cache.arrays]
        return [a if axis == 0 else a.swapaxes(1, 2) for a, axis in zip(padded, self._axes, strict=True)]

    @property
    def _axes(self) -> tuple[int, ...]:
        """Which of its two dims are slots, in a block of each array."""
        return (0, 1) if isinstance(self.cache, LatentCache) else (1,)

    @property
    def specs(self) -> list[pl.BlockSpec]:
        return [pl.BlockSpec(memory_space=pl.ANY) for _ in self.cache.arrays]

    @property
    def scratch(self) -> list[Any]:
        """Two blocks, of which one is read while the other is used; and which of them is next."""
        buffers = [
            pltpu.VMEM((2, self.slots, a.shape[-1]) if axis == 0 else (2, a.shape[-1], self.slots), a.dtype)
            for a, axis in zip(self.cache.arrays, self._axes, strict=True)
        ]
        return [*buffers, pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32)]

    def walk(self, scalars: list[Any], refs: list[Any], scratch: list[Any], absorb: Callable[..., None]) -> None:
        """In a kernel: absorb(first slot, slots held, refs) of all blocks of this step's row and split."""
        *buffers, semaphores, side_ref = scratch
        split, row = pl.program_id(0), pl.program_id(1)

        def span(row: Any) -> tuple[Any, Any]:
            """Its first block and the one after its last."""
            blocks = pl.cdiv(scalars[0][row], self.slots)
            return pl.cdiv(blocks * split, self.splits), pl.cdiv(blocks * (split + 1), self.splits)

        def copies(row: Any, block: Any, side: Any, do: Callable[[Any], None]) -> None:
            """Of the parts of a block that hold something."""
            page = self.cache.arrays[0].shape[1]
            held = jnp.minimum(scalars[0][row] - block * self.slots, self.slots)

            def copy(offset: Any, size: int) -> None:
                slot = block * self.slots + offset
                for ref, buffer, axis in zip(refs, buffers, self._axes, strict=True):
                    before = (slice(None),) * axis
                    if self.cache.page_table_BP is None:
                        source = ref.at[(row, *before, pl.ds(slot, size))]
                    else:
                        pages = self.cache.page_table_BP.shape[1]
                        source = ref.at[scalars[1][row * pages + jax.lax.div(slot, page)]]
                    target = buffer.at[(side, *before, pl.ds(offset, size))]
                    do(pltpu.make_async_copy(source, target, semaphores.at[side]))

            def in_parts(size: int) -> None:
                pl.loop(0, pl.cdiv(held, size))(lambda part: copy(pl.multiple_of(part * size, size), size))

            if self.cache.page_table_BP is None:
                pl.when(held == self.slots)(lambda: copy(0, self.slots))
                pl.when(held < self.slots)(lambda: in_parts(LANES))
            else:
                in_parts(page)

        def start(row: Any, block: Any, side: Any) -> None:
            copies(row, block, side, lambda copy: copy.start())

        def start_next_row(side: Any) -> None:
            @pl.when(row + 1 < self.batch)
            def _():
                begin, end = span(row + 1)
                pl.when(begin < end)(lambda: start(row + 1, begin, side))

        begin, end = span(row)

        @pl.when(row == 0)
        def _():
            side_ref[0] = 0
            pl.when(begin < end)(lambda: start(row, begin, 0))

        @pl.loop(begin, end)
        def _(block):
            side = side_ref[0]
            pl.when(block + 1 < end)(lambda: start(row, block + 1, 1 - side))
            pl.when(block + 1 == end)(lambda: start_next_row(1 - side))
            copies(row, block, side, lambda copy: copy.wait())
            first = block * self.slots
            absorb(first, scalars[0][row] - first, [buffer.at[side] for buffer in buffers])
            side_ref[0] = 1 - side

        pl.when(begin == end)(lambda: start_next_row(side_ref[0]))


def _whole(slots: int) -> int:
    return pl.cdiv(slots, LANES) * LANES
