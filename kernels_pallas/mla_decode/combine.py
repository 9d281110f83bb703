"""Joins attention over parts of the keys."""

import jax
import jax.numpy as jnp


def combine(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """(out [..., C], lse [...]) over all keys from those over disjoint parts of them, in float32.

    Empty parts have lse = -inf; where all are empty the result is zeros and -inf.
    """
    out = jnp.stack([out for out, _ in parts]).astype(jnp.float32)
    lse = jnp.stack([lse for _, lse in parts])
    largest = jnp.max(lse, axis=0)
    weight = jnp.exp(lse - jnp.where(largest == -jnp.inf, 0, largest))
    total = jnp.sum(weight, axis=0)
    some = total > 0
    total = jnp.where(some, total, 1)
    return jnp.sum(out * (weight / total)[..., None], axis=0), jnp.where(some, largest + jnp.log(total), -jnp.inf)
