"""Clipping by the norm of all gradients together."""

import jax
import jax.numpy as jnp


def global_norm(tree) -> jax.Array:
    """Euclidean norm of all leaves together, a float32 scalar; squares are summed in float32 whatever the dtypes."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def clip_scale(norm: jax.Array, max_norm: float) -> jax.Array:
    """What to multiply gradients by so that their norm is at most `max_norm`."""
    return max_norm / jnp.maximum(norm, max_norm)
