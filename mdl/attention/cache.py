"""The key-value cache of one layer: a dict of buffers [B, S, ...] whose slot s belongs to position s of its row."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mdl import sharding

Cache = dict[str, jax.Array]


def write(cache: Cache, new: Cache, positions_BT: jax.Array) -> Cache:
    """Puts `new` [B, T, ...] at each row's consecutive positions; rows may stand at different positions.

    In place where the cache is donated. Slots beyond the row's last position may hold leftovers of padded prompts and rejected
    drafts: attention never looks past a query's own position. A row's tokens that do not all fit behind its position are not
    written; who fills the cache sees to its length, as `mdl.generate` does. Raises ValueError for more tokens than slots.
    """
    return {name: _put(buffer, new[name], positions_BT[:, 0]) for name, buffer in cache.items()}


def _put(buffer: jax.Array, values: jax.Array, start_B: jax.Array) -> jax.Array:
    if values.shape[1] > buffer.shape[1]:
        raise ValueError(f"{values.shape[1]} tokens do not fit a cache of {buffer.shape[1]} positions; make it longer")
    rows, tokens, *rest = sharding.spec_of(values)
    assert tokens is None
    split, starts = P(rows, None, *rest), P(rows)
    window = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, values.ndim)), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )

    def put(buffer: jax.Array, values: jax.Array, start_b: jax.Array) -> jax.Array:
        at_b2 = jnp.stack([jnp.arange(len(start_b), dtype=start_b.dtype), start_b], axis=-1)
        return jax.lax.scatter(
            buffer,
            at_b2,
            values.astype(buffer.dtype),
            window,
            indices_are_sorted=True,
            unique_indices=True,
            mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        )

    run = sharding.local(put, in_specs=(split, split, starts), out_specs=split, vary=sharding.ROWS)
    return run(sharding.reshard(buffer, split), values, sharding.reshard(start_B, starts))
