"""Tiles of the backward pass of attention on Hopper, and what each of its two computing warpgroups sums."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl

from kernels_pallas.flash_attention.hopper import (
    ROWS,
    SHARED_MEMORY,
    WARPGROUPS,
    WIDEST_PRODUCT,
    Columns,
    halves,
    pieces,
    swizzle_of,
)
from kernels_pallas.select import Unsupported


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardTile:
    """Rows of the other side at a time, how many such steps are on their way or in use, and what the two warpgroups sum.

    `sums` are the columns of dq, or of dk and of dv. Given once, each warpgroup sums them for rows of its own; given twice, for the
    same ones: where one has no registers for all, and then both compute the probabilities.
    """

    rows: int
    stages: int
    sums: tuple[tuple[Columns, ...], ...]
    in_shared_memory: bool = False  # see gpu.Tile

    def __post_init__(self):
        if self.rows not in (32, 64, 128) or self.stages < 1:
            raise ValueError(f"{self}: rows must be 32, 64 or 128, and stages at least 1")

    @property
    def blocks(self) -> int:
        """Of ROWS."""
        return WARPGROUPS // len(self.sums)

    @property
    def own_rows(self) -> int:
        """Of a block of threads."""
        return self.blocks * ROWS

    def swizzle(self, K: int, U: int) -> int:
        return swizzle_of(self.rows, K, U)

    def check(self, K: int, U: int) -> None:
        """Unsupported if it does not fit queries and keys of width K and values of width U."""
        scratch = self.in_shared_memory * WARPGROUPS * ROWS * self.rows
        bytes_ = (self.own_rows + self.stages * self.rows) * (2 * (K + U) + 16) + 2 * scratch + 1024
        if bytes_ > SHARED_MEMORY:
            raise Unsupported(
                f"flash_attention on gpu has no backward pass for widths {K} and {U}, whose tiles would take {bytes_} bytes of "
                f"shared memory ({SHARED_MEMORY} are there); 'xla' takes every width"
            )

    def of_warpgroups(self, compute: Callable[..., None]) -> None:
        """compute(its rows among the block's, those of them that it writes, *its sums) in each of them."""
        w = jax.lax.axis_index("warpgroup")
        if self.blocks == WARPGROUPS:
            pl.when(w < WARPGROUPS)(lambda: compute(w, slice(0, ROWS), *self.sums[0]))
            return
        for i, sums in enumerate(self.sums):
            written = slice(i * ROWS // WARPGROUPS, (i + 1) * ROWS // WARPGROUPS)
            pl.when(w == i)(functools.partial(compute, 0, written, *sums))


def choose_dq(K: int, U: int) -> BackwardTile:
    if max(K, U) > WIDEST_PRODUCT:
        return BackwardTile(rows=32, stages=1, sums=tuple((half,) for half in halves(K)))
    return BackwardTile(rows=64, stages=2 if K + U <= 320 else 1, sums=((pieces(0, K),),))


def choose_dk_dv(K: int, U: int) -> list[BackwardTile]:
    """One for each pass over the queries."""
    dk, dv = pieces(0, K), pieces(0, U)
    if max(K, U) > WIDEST_PRODUCT:
        return [
            BackwardTile(rows=32, stages=1, sums=tuple((half, ()) for half in halves(K))),
            BackwardTile(rows=32, stages=1, sums=tuple(((), half) for half in halves(U))),
        ]
    if K + U > 256:
        return [BackwardTile(rows=64, stages=2, sums=((dk, ()), ((), dv)))]
    return [BackwardTile(rows=64, stages=2, sums=((dk, dv),))]
