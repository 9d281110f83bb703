"""A walk over queries that read keys of their own: few at a time, for what they gather is far larger than they are."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.select import platform

# Numbers that are gathered at a time. On CPU they stay in the cache: one query's, at 512 keys of 576 numbers.
GATHERED, CPU_GATHERED = 1 << 26, 1 << 19


def over_queries(some_queries: Callable, queries: Any, keys: tuple[jax.Array, ...], carry: Any) -> tuple[Any, Any]:
    """some_queries(some of `queries`, `keys`, carry) -> (results, carry) for all; the results [B, T, …], and the last carry.

    Queries are arrays [B, T, …], the last of them the indices [B, T, W]; keys are [B, S, …]. Inside the rows of a batch are one
    list: queries [m, …], keys [R, …] and indices into these R; an index that names no key is beyond all of them.
    """
    batch, num_queries, slots = queries[-1].shape
    num_keys = keys[0].shape[1]
    keys = tuple(a.reshape(-1, *a.shape[2:]) for a in keys)
    *others, index_BTW = queries
    first_B11 = num_keys * jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    named_BTW = (index_BTW >= 0) & (index_BTW < num_keys)
    index_BTW = jnp.where(named_BTW, first_B11 + index_BTW.astype(jnp.int32), batch * num_keys)

    total = batch * num_queries
    numbers = slots * sum(math.prod(a.shape[1:]) for a in keys)
    most = max(1, (CPU_GATHERED if platform() == "cpu" else GATHERED) // numbers)
    # Padding copies the queries: chunks may be smaller, up to half, to need none.
    chunk = next((c for c in range(most, most // 2, -1) if total % c == 0), min(most, total))
    chunks = math.ceil(total / chunk)

    def split(a: jax.Array, padding: int = 0) -> jax.Array:
        a = a.reshape(total, *a.shape[2:])
        missing = [(0, chunks * chunk - total)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, missing, constant_values=padding).reshape(chunks, chunk, *a.shape[1:])

    # What pads the last chunk names no key, so that it adds nothing to what is carried.
    parts = (*(split(a) for a in others), split(index_BTW, batch * num_keys))
    carry, results = jax.lax.scan(lambda carry, part: some_queries(part, keys, carry)[::-1], carry, parts)
    return jax.tree.map(
        lambda a: a.reshape(-1, *a.shape[2:])[:total].reshape(batch, num_queries, *a.shape[2:]), results
    ), carry
