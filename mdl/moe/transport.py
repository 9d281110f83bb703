"""What every transport of tokens to experts shares.

A token travels at most once to each device, however many of its experts are there, and what comes back is already summed over them.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

AXIS = "expert"  # mesh axis over which experts are split


class Rows(NamedTuple):
    """Tokens with their experts, numbered over all devices, and the weights of these. A number outside [0, E) is no expert."""

    x_MD: jax.Array
    index_MX: jax.Array
    weight_MX: jax.Array


class Traffic(NamedTuple):
    """What one device counts, int32 scalars."""

    moved: jax.Array  # rows that it sent, those to itself included
    dropped: jax.Array  # choices of its tokens that found no room


Compute = Callable[[Rows], jax.Array]  # rows -> y_MD, zero for choices of other devices' experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transport(abc.ABC):
    # Parts of a device's tokens that do not wait for each other: 2 lets one travel while the other is computed. Smaller products
    # and as many more exchanges are the price; with 1 only shared experts are computed meanwhile.
    num_parts: int = 1

    platforms: ClassVar[tuple[str, ...]] = ("cpu", "gpu", "tpu")  # as `jax.default_backend()` spells them

    def __post_init__(self):
        if self.num_parts < 1:
            raise ValueError(f"num_parts={self.num_parts} must be at least 1")

    @abc.abstractmethod
    def carry(self, rows: Rows, compute: Compute, experts_per_device: int) -> tuple[jax.Array, Traffic]:
        """Inside `shard_map`: the outputs of this device's tokens; `compute` runs its experts on whatever rows have come."""

    def carry_in_parts(self, rows: Rows, compute: Compute, experts_per_device: int) -> tuple[jax.Array, Traffic]:
        num_parts = min(self.num_parts, rows.x_MD.shape[0])
        parts = map(Rows, *(jnp.array_split(a, num_parts) for a in rows))
        y_parts, traffics = zip(*(self.carry(part, compute, experts_per_device) for part in parts), strict=True)
        return jnp.concatenate(y_parts), jax.tree.map(lambda *counts: sum(counts), *traffics)
