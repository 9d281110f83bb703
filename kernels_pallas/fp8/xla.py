"""The FP8 formats in plain JAX, blocks as dims of their own."""

import jax
import jax.numpy as jnp

MAX = 448.0  # the largest e4m3fn


def quantize(x_MN: jax.Array, block: tuple[int, int], ue8m0: bool, amax_floor: float) -> tuple[jax.Array, jax.Array]:
    """(data, scale) as the public functions promise; `x_MN` may have leading dims."""
    shape = x_MN.shape
    x = _split(x_MN, block).astype(jnp.float32)  # [..., M / m, m, N / n, n]
    finite = jnp.abs(x) < jnp.inf
    amax = jnp.max(jnp.where(finite, jnp.abs(x), 0), axis=(-3, -1), keepdims=True)
    scale = jnp.maximum(amax, amax_floor) * jnp.float32(1 / MAX)
    if ue8m0:
        scale = round_up_to_power_of_two(scale)
    y = jnp.where(finite, jnp.clip(x / scale, -MAX, MAX), jnp.nan)  # clamped: beyond 464 some casts give NaN, some 448
    return _join(y.astype(jnp.float8_e4m3fn), shape), jnp.squeeze(scale, (-3, -1))


def dequantize(data_MN: jax.Array, scale: jax.Array, block: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """float32(data) * scale, rounded once to `dtype`; `data_MN` may have leading dims."""
    data = _split(data_MN, block).astype(jnp.float32)
    scale = scale.astype(jnp.float32)[..., :, None, :, None]
    return _join((data * scale).astype(dtype), data_MN.shape)


def round_up_to_power_of_two(scale: jax.Array) -> jax.Array:
    """On bits, for positive normal float32: exp2 and log2 are not exact, and a cast to float8_e8m0fnu rounds to nearest."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def _split(x_MN: jax.Array, block: tuple[int, int]) -> jax.Array:
    """[..., M, N] to [..., M / m, m, N / n, n], edges padded with zeros."""
    *leading, rows, columns = x_MN.shape
    m, n = -(-rows // block[0]), -(-columns // block[1])
    x_MN = jnp.pad(x_MN, (*((0, 0) for _ in leading), (0, m * block[0] - rows), (0, n * block[1] - columns)))
    return x_MN.reshape(*leading, m, block[0], n, block[1])


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    *leading, m, block_rows, n, block_columns = x.shape
    x_MN = x.reshape(*leading, m * block_rows, n * block_columns)
    return x_MN[..., : shape[-2], : shape[-1]]
