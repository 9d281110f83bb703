"""Transports that move tokens only to the devices that need them."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

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
        True  # a layer that finds too little room is exchanged with room for all tokens; off: drops choices
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
        choices = Choices.of(rows.index_MX, experts_per_device, num_devices)

        def exchange(rows: Rows, plan: Plan) -> tuple[jax.Array, Traffic]:
            # Expert numbers travel counted from 1: a row that nobody filled has no expert.
            sent = jax.tree.map(plan.order.take, rows._replace(index_MX=rows.index_MX + 1))
            come = Rows(*map(plan.there, sent))
            y_MD = plan.back(compute(come._replace(index_MX=come.index_MX - 1)))
            return plan.order.add(y_MD), plan.order.traffic

        def without_limit(rows: Rows) -> tuple[jax.Array, Traffic]:
            return exchange(rows, self.plan(choices, num_tokens))

        if self.capacity_factor is None:
            return without_limit(rows)
        room = math.ceil(self.capacity_factor * num_tokens * X / num_devices)
        if room >= num_tokens:
            return without_limit(rows)
        plan = self.plan(choices, room)
        if not self.dropless:
            return exchange(rows, plan)
        # All devices go the same way. The large buffers are recomputed, or every backward pass would keep room for them.
        fits = jax.lax.psum(plan.order.traffic.dropped, sharding.ROWS) == 0
        return jax.lax.cond(fits, lambda rows: exchange(rows, plan), jax.checkpoint(without_limit), rows)
