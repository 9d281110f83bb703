"""Every device sends each other just the tokens that it needs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mdl import sharding
from mdl.moe.transport import AXIS
from mdl.moe.transport_exchange import ExchangeConfig, Plan
from mdl.moe.transport_order import Choices, Order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """What one device knows of one direction, in the terms of `jax.lax.ragged_all_to_all`."""

    input_offsets: jax.Array  # [O] where the rows for each device begin
    send_sizes: jax.Array  # [O] how many they are
    output_offsets: jax.Array  # [O] where each device puts them
    recv_sizes: jax.Array  # [O] how many rows of each device come
    num_rows: int = dataclasses.field(metadata={"static": True})  # of the buffer in which they come


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def move(primitive: Callable[..., jax.Array], x_MD: jax.Array, there: Way, back: Way) -> jax.Array:
    """Rows by way of `there`, zeros where none come; the gradient travels `back`."""
    nothing_MD = sharding.varying(jnp.zeros((there.num_rows, *x_MD.shape[1:]), x_MD.dtype))
    ways = there.input_offsets, there.send_sizes, there.output_offsets, there.recv_sizes
    return primitive(x_MD, nothing_MD, *ways, axis_name=AXIS)


def _move_fwd(primitive: Callable, x_MD: jax.Array, there: Way, back: Way) -> tuple[jax.Array, tuple[Way, Way]]:
    return move(primitive, x_MD, there, back), (there, back)


def _move_bwd(primitive: Callable, ways: tuple[Way, Way], dy_MD: jax.Array) -> tuple[jax.Array, None, None]:
    there, back = ways
    return move(primitive, dy_MD, back, there), None, None


move.defvjp(_move_fwd, _move_bwd)


def ragged_by_all_gather(
    operand_MD: jax.Array,
    output_MD: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, where every device receives everything and picks out its own."""
    me = jax.lax.axis_index(axis_name)
    del send_sizes  # what the others say is what recv_sizes says
    everyones_MD = jax.lax.all_gather(operand_MD, axis_name, axis=0, tiled=True)
    from_O, at_O = (jax.lax.all_gather(a, axis_name, axis=0)[:, me] for a in (input_offsets, output_offsets))
    row_M = jnp.arange(output_MD.shape[0], dtype=jnp.int32)
    is_from_MO = (row_M[:, None] >= at_O) & (row_M[:, None] < at_O + recv_sizes)
    source_M = jnp.argmax(is_from_MO, axis=1)
    came_from_M = source_M * operand_MD.shape[0] + from_O[source_M] + row_M - at_O[source_M]
    came_MD = everyones_MD.at[came_from_M].get(mode="clip")
    is_filled_M = jnp.any(is_from_MO, axis=1).reshape(-1, *(1,) * (output_MD.ndim - 1))
    return jnp.where(is_filled_M, came_MD, output_MD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedAllToAllConfig(ExchangeConfig):
    """`jax.lax.ragged_all_to_all`: traffic is what the routing needs; only the buffer that receives it has a fixed size."""

    platforms: ClassVar[tuple[str, ...]] = ("gpu", "tpu")
    primitive: ClassVar[Any] = staticmethod(jax.lax.ragged_all_to_all)

    def plan(self, choices: Choices, room: int) -> Plan:
        num_tokens, X = choices.owner_tX.shape
        me, num_devices = jax.lax.axis_index(AXIS), sharding.axis_size(AXIS)
        sent_rows, received_rows = num_tokens * min(X, num_devices), num_devices * room

        size_OO = jax.lax.all_gather(choices.size_O, AXIS, axis=0)  # [from, to]
        size_OO = jnp.clip(
            received_rows - _starts(size_OO, axis=0), 0, size_OO
        )  # where room ends, the last devices' rows drop
        leave_at_OO, come_at_OO = _starts(size_OO, axis=1), _starts(size_OO, axis=0)
        order = Order.of(choices, leave_at_OO[me], size_OO[me], sent_rows)
        there = Way(
            input_offsets=leave_at_OO[me],
            send_sizes=size_OO[me],
            output_offsets=come_at_OO[me],
            recv_sizes=size_OO[:, me],
            num_rows=received_rows,
        )
        back = Way(
            input_offsets=come_at_OO[:, me],
            send_sizes=size_OO[:, me],
            output_offsets=leave_at_OO[:, me],
            recv_sizes=size_OO[me],
            num_rows=sent_rows,
        )
        return Plan(
            order,
            lambda x_MD: move(self.primitive, x_MD, there, back),
            lambda y_MD: move(self.primitive, y_MD, back, there),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmulatedRaggedConfig(RaggedAllToAllConfig):
    """The same code around an all-gather, for platforms without the collective; to test with, not for speed."""

    platforms: ClassVar[tuple[str, ...]] = ("cpu", "gpu", "tpu")
    primitive: ClassVar[Any] = staticmethod(ragged_by_all_gather)


def _starts(size_OO: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(size_OO, axis=axis) - size_OO
