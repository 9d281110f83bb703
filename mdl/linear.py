"""Parameters and the products with them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from mdl import sharding
from mdl.precision import PrecisionConfig


@dataclasses.dataclass(frozen=True)
class Init:
    """Makes parameters: dtype, distribution and sharding in one place.

    DeepSeek-V3 draws every matrix from a normal with standard deviation 0.006 (report, section 4.2); norms start at one.
    Each parameter keeps its logical axis names as the metadata `axes`.
    """

    rngs: nnx.Rngs
    std: float
    precision: PrecisionConfig

    def normal(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        partition = sharding.optional_sharding(sharding.spec(*axes))
        value = self.std * jax.random.normal(
            self.rngs.params(), shape, self.precision.param_dtype, out_sharding=partition
        )
        return nnx.Param(value, axes=axes)

    def ones(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return nnx.Param(jnp.ones(shape, self.precision.param_dtype), axes=axes)


def einsum(equation: str, x: jax.Array, w: jax.Array, precision: PrecisionConfig) -> jax.Array:
    """`jnp.einsum` of an activation and a parameter; each output dim keeps the sharding of the dim that it comes from.

    A contraction over a split dim is summed across devices. Computes in the compute dtype, accumulates in the accumulation dtype.
    """
    out_sharding = None
    if sharding.mesh_is_set():
        operands, out = equation.split("->")
        x_dims, w_dims = operands.split(",")
        names = dict(zip(w_dims, jax.typeof(w).sharding.spec, strict=True))
        names |= dict(zip(x_dims, jax.typeof(x).sharding.spec, strict=True))
        out_sharding = P(*(names[dim] for dim in out))
    product = jnp.einsum(equation, x, w, preferred_element_type=precision.accumulation_dtype, out_sharding=out_sharding)
    return product.astype(precision.compute_dtype)


class Linear(nnx.Module):
    """y = einsum(equation, x, w), without bias. Weights are stored as the equation spells them, heads as dims of their own."""

    def __init__(self, equation: str, shape: tuple[int, ...], axes: tuple[str | None, ...], *, init: Init):
        self.equation = equation
        self.precision = init.precision
        self.weight = init.normal(shape, axes)

    def gathered_weight(self) -> jax.Array:
        """The weight in the compute dtype, gathered over the row axes; the cast comes first, so that the gather moves less."""
        w = self.weight[...].astype(self.precision.compute_dtype)
        return sharding.reshard(w, sharding.gathered(*self.weight.axes))

    def __call__(self, x: jax.Array) -> jax.Array:
        return einsum(self.equation, x.astype(self.precision.compute_dtype), self.gathered_weight(), self.precision)
