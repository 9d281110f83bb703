"""Transports that move tokens only to the devices that need them."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdl import sharding
from mdl.moe.transport import AXIS, Compute, Rows, Traffic, Transport
from mdl.moe.transport_order import Choices, Order


class Plan(NamedTuple):
    """How rows travel: in which order they leave, and two moves between devices, each the inverse of the other."""

    order: Order
    there: Callable[[jax.Array], jax.Array]
    back: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeConfig(Transport):
    """Static shapes need an upper bound of what a device receives: `capacity_factor` times the mean of equal loads."""

    capacity_factor: float | None = (
        None  # room for tokens on each device, as a multiple of the mean; none: for all tokens
    )
    dropless: bool = (
        True  # choices that find too little room follow in an exchange with room for all tokens; off: they are dropped
    )

    def __post_init__(self):
        super().__post_init__()
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be positive; none makes room for all tokens")

    @abc.abstractmethod
    def plan(self, choices: Choices, room: int) -> Plan:
        """With room for `room` tokens from each of the devices, or as many in all."""

    def carry(self, rows: Rows, compute: Compute, experts_per_device: int) -> tuple[jax.Array, Traffic]:
        num_tokens, X = rows.index_MX.shape
        num_devices = sharding.axis_size(AXIS)

        def exchange(rows: Rows, room: int) -> tuple[jax.Array, Order]:
            plan = self.plan(Choices.of(rows.index_MX, experts_per_device, num_devices), room)
            # Expert numbers travel counted from 1: a row that nobody filled has no expert.
            sent = jax.tree.map(plan.order.take, rows._replace(index_MX=rows.index_MX + 1))
            come = Rows(*map(plan.there, sent))
            y_MD = plan.back(compute(come._replace(index_MX=come.index_MX - 1)))
            return plan.order.add(y_MD), plan.order

        mean = num_tokens * X / num_devices
        room = num_tokens if self.capacity_factor is None else min(num_tokens, math.ceil(self.capacity_factor * mean))
        y_MD, order = exchange(rows, room)
        if room == num_tokens or not self.dropless:
            return y_MD, order.traffic

        # All devices go the same way. The large buffers are recomputed, or every backward pass would keep room for them. What has
        # found room is not part of the condition: compilers let nothing else run beside one.
        @jax.checkpoint
        def add_rest(y_MD: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
            no_expert = num_devices * experts_per_device
            rest = rows._replace(index_MX=jnp.where(order.dropped_tX, rows.index_MX, no_expert))
            more_MD, its_order = exchange(rest, num_tokens)
            return y_MD + more_MD, moved + its_order.traffic.moved

        fits = jax.lax.psum(order.traffic.dropped, sharding.ROWS) == 0
        y_MD, moved = jax.lax.cond(fits, lambda *carried: carried, add_rest, y_MD, order.traffic.moved)
        return y_MD, Traffic(moved, jnp.zeros_like(moved))
