"""Every device has a fixed number of slots for tokens of every other."""

import dataclasses

import jax
import jax.numpy as jnp

from mdl import sharding
from mdl.moe.transport import AXIS
from mdl.moe.transport_exchange import ExchangeConfig, Plan
from mdl.moe.transport_order import Choices, Order


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllToAllConfig(ExchangeConfig):
    """`jax.lax.all_to_all` of slots, of which the loads leave some empty."""

    capacity_factor: float | None = 1.5  # slots for tokens of each device, as a multiple of the mean; none: for all

    def plan(self, choices: Choices, room: int) -> Plan:
        num_devices = sharding.axis_size(AXIS)
        device_O = jnp.arange(num_devices, dtype=jnp.int32)
        order = Order.of(choices, device_O * room, jnp.full_like(device_O, room), num_devices * room)

        def move(x_MD: jax.Array) -> jax.Array:
            return jax.lax.all_to_all(x_MD, AXIS, split_axis=0, concat_axis=0, tiled=True)

        return Plan(order, move, move)
