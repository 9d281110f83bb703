"""data = e4m3(clamp(x / scale, ±448)) with scale = max(amax of the block, floor) * (1 / 448), in float32."""

import jax
import jax.numpy as jnp


def quantize(x_MN: jax.Array, block: tuple[int, int], ue8m0: bool, amax_floor: float) -> tuple[jax.Array, jax.Array]:
    x_MN = x_MN.astype(jnp.float32)
    finite_MN = jnp.isfinite(x_MN)
    row_M1, column_N = _block_of(x_MN.shape, block)
    grid = (*x_MN.shape[:-2], -(-x_MN.shape[-2] // block[0]), -(-x_MN.shape[-1] // block[1]))
    amax = jnp.full(grid, amax_floor, jnp.float32)
    amax = amax.at[..., row_M1, column_N].max(jnp.where(finite_MN, jnp.abs(x_MN), 0))
    scale = amax * jnp.float32(1 / 448)
    if ue8m0:
        fraction, exponent = jnp.frexp(scale)  # scale = fraction * 2**exponent, fraction in [1/2, 1)
        scale = jnp.ldexp(jnp.float32(1), exponent - (fraction == 0.5))
    # A mere broadcast as divisor would become a product with its reciprocal in XLA, and round differently.
    divisor_MN = jnp.where(finite_MN, scale[..., row_M1, column_N], 1)
    y_MN = jnp.clip(x_MN / divisor_MN, -448, 448)
    return jnp.where(finite_MN, y_MN, jnp.nan).astype(jnp.float8_e4m3fn), scale


def dequantize(data_MN: jax.Array, scale: jax.Array, block: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    row_M1, column_N = _block_of(data_MN.shape, block)
    scale_MN = scale.astype(jnp.float32)[..., row_M1, column_N]
    return (data_MN.astype(jnp.float32) * scale_MN).astype(dtype)


def _block_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    return jnp.arange(shape[-2])[:, None] // block[0], jnp.arange(shape[-1]) // block[1]
