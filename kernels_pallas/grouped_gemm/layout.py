"""Where the rows of groups lie: a padded batch for most of them, blocks of one group each for the overflow.

A batched product needs groups of equal length, routed loads are unequal, and the shapes must be static. So each group gets
`capacity` slots, its mean load, and one batched product takes them all; what a busy group has beyond its slots goes block by
block through a loop whose trip count is data. No row is dropped, and no group's idle matrix costs more than its empty slots.

The mean was measured on CPU against 0.75, 1.125 and 1.3 times it (busiest group at 1.0, 1.7 and 4 times the mean): more slots
cost more in padding than they save in blocks, fewer gain nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

BLOCK = 64  # rows at a time in the overflow: of 128, an expert just above the mean would leave most empty

Carry = TypeVar("Carry")


def capacity(num_rows: int, num_groups: int) -> int:
    """Slots per group; 0 (everything by blocks, idle matrices never read) when there are fewer rows than groups."""
    if num_rows < num_groups:
        return 0
    return min(num_rows, 4 * math.ceil(num_rows / num_groups / 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Rows sorted by group: group e owns `sizes_E[e]` rows from `starts_E[e]`; `num_rows` is the static bound."""

    sizes_E: jax.Array
    starts_E: jax.Array
    num_rows: int
    capacity: int

    @classmethod
    def of(cls, sizes_E: jax.Array, num_rows: int, slots: int | None = None) -> "Layout":
        """With `slots` per group; None: with `capacity` of them, for rows that all belong to some group."""
        sizes_E = sizes_E.astype(jnp.int32)
        starts_E = jnp.cumsum(sizes_E) - sizes_E
        slots = capacity(num_rows, sizes_E.shape[0]) if slots is None else slots
        return cls(sizes_E=sizes_E, starts_E=starts_E, num_rows=num_rows, capacity=slots)

    def row_EC(self) -> jax.Array:
        """The sorted row in each slot; `num_rows` where the slot is empty."""
        c_1C = jnp.arange(self.capacity, dtype=jnp.int32)[None]
        return jnp.where(c_1C < self.sizes_E[:, None], self.starts_E[:, None] + c_1C, self.num_rows)

    def slot_M(self, group_M: jax.Array) -> jax.Array:
        """The slot (of E·C) of each sorted row; E·C for a row in the overflow or beyond all groups (group E)."""
        num_groups = self.sizes_E.shape[0]
        position_M = jnp.arange(self.num_rows, dtype=jnp.int32) - self.starts_E.at[group_M].get(mode="clip")
        in_slot_M = (position_M < self.capacity) & (group_M < num_groups)
        return jnp.where(in_slot_M, group_M * self.capacity + position_M, num_groups * self.capacity)

    def group_M(self) -> jax.Array:
        """The group of each sorted row; E beyond the last."""
        rows_M1 = jnp.arange(self.num_rows, dtype=jnp.int32)[:, None]
        return jnp.sum(rows_M1 >= (self.starts_E + self.sizes_E)[None], axis=1, dtype=jnp.int32)

    def over_blocks(self, body: Callable[[Carry, jax.Array, jax.Array], Carry], carry: Carry) -> Carry:
        """`carry = body(carry, group, row_R)` for every block of overflow; `row_R` is `num_rows` where a block is not full.

        Adds nothing to the program when no group can overflow.
        """
        if self.capacity >= self.num_rows:
            return carry
        block = min(BLOCK, max(8, self.capacity))
        blocks_E = -(-jnp.maximum(self.sizes_E - self.capacity, 0) // block)
        ends_E = jnp.cumsum(blocks_E)

        def step(state: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
            i, carry = state
            group = jnp.sum(i >= ends_E, dtype=jnp.int32)
            nth = i - (ends_E[group] - blocks_E[group])
            position_R = self.capacity + nth * block + jnp.arange(block, dtype=jnp.int32)
            row_R = jnp.where(position_R < self.sizes_E[group], self.starts_E[group] + position_R, self.num_rows)
            return i + 1, body(carry, group, row_R)

        # Inside shard_map the counter must vary over the mesh axes that the loads vary over.
        first = ends_E[-1] * 0
        return jax.lax.while_loop(lambda state: state[0] < ends_E[-1], step, (first, carry))[1]


def take_rows(x_MD: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of x by number; zeros for a number that is out of range."""
    if x_MD.shape[0] == 0:  # zeros made from an argument: inside shard_map they must vary as the row numbers do
        zeros = (rows * 0).astype(x_MD.dtype)
        return jnp.broadcast_to(zeros.reshape(*rows.shape, *[1] * (x_MD.ndim - 1)), (*rows.shape, *x_MD.shape[1:]))
    return x_MD.at[rows].get(mode="fill", fill_value=0)
