"""Inside shard_map: the mesh axes that arrays vary over."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def vary_alike(tree: Tree) -> Tree:
    """Lets all arrays of a tree vary over the same axes, those of any of them; a gradient then has its argument's type."""
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(leaf).manual_axis_type.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def full(shape: tuple[int, ...], value: float, dtype: Any, like: jax.Array) -> jax.Array:
    """A constant that varies over the axes that `like` varies over, as what a loop carries must if its results do."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    constant = jnp.full(shape, value, dtype)
    return jax.lax.pcast(constant, axes, to="varying") if axes else constant
