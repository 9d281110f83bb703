"""Parameters and the products with them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from mdl import sharding
from mdl.kernels import KernelsConfig
from mdl.precision import PrecisionConfig


@dataclasses.dataclass(frozen=True)
class Init:
    """Makes parameters: dtype, distribution and sharding in one place; and what modules are told of how to compute.

    DeepSeek-V3 draws every matrix from a normal with standard deviation 0.006 (report, section 4.2); norms start at one.
    Each parameter keeps its logical axis names as the metadata `axes`.
    """

    rngs: nnx.Rngs
    std: float
    precision: PrecisionConfig
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)

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


def matmul(
    x: jax.Array,
    w: jax.Array,
    axes: tuple[str | None, ...],
    precision: PrecisionConfig,
    *,
    num_contracted: int = 1,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """x [B, T, *in] times the parameter w [*in, *out], whose dims are named `axes` -> [B, T, *out].

    Dims of `out` are split as those of w, less what only splits it in memory; a contraction over a split dim is summed across
    devices. Computes in the compute dtype, accumulates in the accumulation dtype. The product itself has two dims a side: with
    more, XLA:CPU copies operands of the backward products.
    """
    dtype, used = precision.compute_dtype, sharding.gathered(*axes)

    def product(x_btI, w_IO):
        w_IO = sharding.gather(w_IO, dtype, *axes)
        rows, out = x_btI.shape[:2], w_IO.shape[num_contracted:]
        y_MO = jnp.matmul(
            x_btI.astype(dtype).reshape(math.prod(rows), -1),
            w_IO.reshape(-1, math.prod(out)),
            preferred_element_type=precision.accumulation_dtype,
        )
        if sharding.mesh_is_set() and any(used[:num_contracted]):
            y_MO = jax.lax.psum(y_MO, "tensor")
        return y_MO.astype(out_dtype or dtype).reshape(*rows, *out)

    rows = sharding.spec("batch", None)
    return sharding.local(
        product,
        in_specs=(P(*rows, *used[:num_contracted]), sharding.spec(*axes)),
        out_specs=P(*rows, *used[num_contracted:]),
        vary=sharding.ROWS,  # along `tensor` only what is split differs
    )(x, w)


class Linear(nnx.Module):
    """y = x w, without bias: x [B, T, *in_dims] -> [B, T, *out_dims]; heads are dims of their own. `axes` names the dims of w."""

    def __init__(
        self, in_dims: tuple[int, ...], out_dims: tuple[int, ...], axes: tuple[str | None, ...], *, init: Init
    ):
        self.num_contracted = len(in_dims)
        self.precision = init.precision
        self.weight = init.normal((*in_dims, *out_dims), axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        return matmul(x, self.weight[...], self.weight.axes, self.precision, num_contracted=self.num_contracted)

    def gathered_weight(self) -> jax.Array:
        """The weight in the compute dtype, whole where it only is split in memory; the cast comes first, so that less is moved."""
        return sharding.reshard(
            self.weight[...].astype(self.precision.compute_dtype), sharding.gathered(*self.weight.axes)
        )
