"""Which tokens travel to which device, and in which rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdl.moe.transport import Traffic


class Choices(NamedTuple):
    """Where this device's tokens want to go."""

    owner_tX: jax.Array  # the device that owns the chosen expert; O for no expert
    first_tX: jax.Array  # whether no earlier choice of the token has the same owner
    position_tX: jax.Array  # the token's number among those that go to the owner
    size_O: jax.Array  # how many go there

    @classmethod
    def of(cls, index_tX: jax.Array, experts_per_device: int, num_devices: int) -> "Choices":
        owner_tX = index_tX // experts_per_device
        visits_tO = jnp.any(owner_tX[..., None] == jnp.arange(num_devices), axis=1).astype(jnp.int32)
        position_tO = jnp.cumsum(visits_tO, axis=0) - visits_tO
        earlier_XX = jnp.tri(index_tX.shape[1], k=-1, dtype=bool)
        first_tX = ~jnp.any((owner_tX[:, :, None] == owner_tX[:, None, :]) & earlier_XX, axis=-1)
        position_tX = jnp.take_along_axis(position_tO, owner_tX, axis=1, mode="clip")
        return cls(owner_tX, first_tX, position_tX, jnp.sum(visits_tO, axis=0))


class Order(NamedTuple):
    """The rows of a buffer, one for each token and device that it goes to.

    `take` and `add` move rows by gathers alone, and each is the other's transpose.
    """

    token_M: jax.Array  # the token in each row; t for an empty row
    row_tX: jax.Array  # the row that goes to the owner of this choice; M where an earlier choice has it, or none
    dropped_tX: jax.Array  # choices that found no room
    traffic: Traffic

    @classmethod
    def of(cls, choices: Choices, start_O: jax.Array, room_O: jax.Array, num_rows: int) -> "Order":
        """The first `room_O` tokens for each device, from row `start_O` on."""
        num_tokens, X = choices.owner_tX.shape
        here_tX = choices.owner_tX < start_O.shape[0]
        kept_tX = here_tX & (choices.position_tX < room_O.at[choices.owner_tX].get(mode="clip"))
        moved_tX = kept_tX & choices.first_tX
        row_tX = start_O.at[choices.owner_tX].get(mode="clip") + choices.position_tX
        row_tX = jnp.where(moved_tX, row_tX, num_rows)
        token_M = jnp.full((num_rows,), num_tokens, jnp.int32)
        token_tX = jnp.arange(num_tokens, dtype=jnp.int32)[:, None].repeat(X, axis=1)
        token_M = token_M.at[row_tX].set(token_tX, mode="drop")
        dropped_tX = here_tX & ~kept_tX
        return cls(token_M, row_tX, dropped_tX, Traffic(*(jnp.sum(a, dtype=jnp.int32) for a in (moved_tX, dropped_tX))))

    def take(self, x_tD: jax.Array) -> jax.Array:
        """The tokens in order, [M, D]; zeros in empty rows."""
        return _take(x_tD, self.token_M, self.row_tX)

    def add(self, y_MD: jax.Array) -> jax.Array:
        """The sum of each token's rows, [t, D]."""
        return _add(y_MD, self.token_M, self.row_tX)


@jax.custom_vjp
def _take(x_tD: jax.Array, token_M: jax.Array, row_tX: jax.Array) -> jax.Array:
    return x_tD.at[token_M].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _add(y_MD: jax.Array, token_M: jax.Array, row_tX: jax.Array) -> jax.Array:
    y_tXD = y_MD.at[row_tX].get(mode="fill", fill_value=0)
    return jnp.sum(y_tXD, axis=1, dtype=jnp.promote_types(y_MD.dtype, jnp.float32)).astype(y_MD.dtype)


_take.defvjp(lambda x, *order: (_take(x, *order), order), lambda order, dy: (_add(dy, *order), None, None))
_add.defvjp(lambda y, *order: (_add(y, *order), order), lambda order, dx: (_take(dx, *order), None, None))
