"""The key-value cache of one layer: a dict of buffers [B, S, ...] whose slot s belongs to position s of its row."""

import jax
import jax.numpy as jnp

Cache = dict[str, jax.Array]


def write(cache: Cache, new: Cache, positions_BT: jax.Array) -> Cache:
    """Puts `new` [B, T, ...] at each row's consecutive positions; rows may stand at different positions.

    Written as a select, so that it works on rows split over devices. Slots beyond the row's last position may hold leftovers of
    padded prompts: attention never looks past a query's own position.
    """

    def put(buffer: jax.Array, values: jax.Array) -> jax.Array:
        S, T = buffer.shape[1], values.shape[1]
        offset_BS = jnp.arange(S, dtype=jnp.int32) - positions_BT[:, :1]
        shape = offset_BS.shape + (1,) * (buffer.ndim - 2)
        source = jnp.clip(offset_BS, 0, T - 1).reshape(shape)
        moved = jnp.take_along_axis(values.astype(buffer.dtype), source, axis=1)
        inside = ((offset_BS >= 0) & (offset_BS < T)).reshape(shape)
        return jnp.where(inside, moved, buffer)

    return jax.tree.map(put, cache, new)
