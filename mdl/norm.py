"""Normalization of the last dim."""

import jax
import jax.numpy as jnp
from flax import nnx

from mdl.linear import Init


class RmsNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in float32; cast to the compute dtype before the weight, as the
    published DeepSeek, Qwen and Llama code does."""

    def __init__(self, dim: int, *, eps: float, init: Init):
        self.eps = eps
        self.precision = init.precision
        self.weight = init.ones((dim,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.precision.compute_dtype
        wide = x.astype(jnp.promote_types(dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(dtype) * self.weight[...].astype(dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dim, in float32 throughout."""

    def __init__(self, dim: int, *, eps: float, init: Init):
        self.eps = eps
        self.precision = init.precision
        self.weight = init.ones((dim,), (None,))
        self.bias = init.zeros((dim,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.precision.compute_dtype
        wide = x.astype(jnp.promote_types(dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(wide.dtype) + self.bias[...].astype(wide.dtype)).astype(dtype)
