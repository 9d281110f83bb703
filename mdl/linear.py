"""Parameters and the products with them."""

import dataclasses
import math

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

    def zeros(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return nnx.Param(jnp.zeros(shape, self.precision.param_dtype), axes=axes)


def matmul(x: jax.Array, w: jax.Array, precision: PrecisionConfig, *, num_contracted: int = 1) -> jax.Array:
    """x [B, T, *in] times w [*in, *out] -> [B, T, *out]; each output dim keeps the sharding of the dim that it comes from.

    A contraction over a split dim is summed across devices. Computes in the compute dtype, accumulates in the accumulation dtype.
    The product itself has two dims a side: with more, XLA:CPU copies operands of the backward products.
    """
    rows, out = x.shape[:2], w.shape[num_contracted:]
    x_spec, w_spec = sharding.spec_of(x), sharding.spec_of(w)
    # Of merged dims only the first may be split.
    x_MI = sharding.reshape(x, (math.prod(rows), -1), P(x_spec[0], x_spec[2]))
    w_IO = sharding.reshape(w, (-1, math.prod(out)), P(w_spec[0], w_spec[num_contracted]))
    y_MO = jnp.matmul(
        x_MI,
        w_IO,
        preferred_element_type=precision.accumulation_dtype,
        out_sharding=sharding.optional_sharding(P(x_spec[0], w_spec[num_contracted])),
    ).astype(precision.compute_dtype)
    return sharding.reshape(y_MO, (*rows, *out), P(*x_spec[:2], *w_spec[num_contracted:]))


class Linear(nnx.Module):
    """y = x w, without bias: x [B, T, *in_dims] -> [B, T, *out_dims]; heads are dims of their own. `axes` names the dims of w."""

    def __init__(
        self, in_dims: tuple[int, ...], out_dims: tuple[int, ...], axes: tuple[str | None, ...], *, init: Init
    ):
        self.num_contracted = len(in_dims)
        self.precision = init.precision
        self.weight = init.normal((*in_dims, *out_dims), axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.gathered_weight()
        return matmul(x.astype(self.precision.compute_dtype), w, self.precision, num_contracted=self.num_contracted)

    def gathered_weight(self) -> jax.Array:
        """The weight in the compute dtype, whole along the row axes; the cast comes before the gather, so that less is moved."""
        return sharding.reshard(
            self.weight[...].astype(self.precision.compute_dtype), sharding.gathered(*self.weight.axes)
        )
