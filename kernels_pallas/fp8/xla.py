"""The FP8 formats in plain JAX, blocks as dims of their own.

Devices that cast to FP8 in hardware get the formulas as they stand. XLA:CPU emulates the cast and takes float maxima one by one,
so there `quantize` makes the same bits with integers, in a quarter of the time.
"""

import functools

import jax
import jax.numpy as jnp

MAX = 448.0  # the largest e4m3fn
_LANES = 8  # maxima that XLA:CPU takes at once


def quantize(x_MN: jax.Array, block: tuple[int, int], ue8m0: bool, amax_floor: float) -> tuple[jax.Array, jax.Array]:
    """(data, scale) as the public functions promise; `x_MN` may have leading dims."""
    options = {"block": block, "ue8m0": ue8m0, "amax_floor": amax_floor}
    return jax.lax.platform_dependent(
        x_MN,
        cpu=functools.partial(quantize_with_integers, **options),
        default=functools.partial(quantize_with_casts, **options),
    )


def quantize_with_casts(
    x_MN: jax.Array, *, block: tuple[int, int], ue8m0: bool, amax_floor: float
) -> tuple[jax.Array, jax.Array]:
    """The formula, clamped before the cast: beyond 464 some devices give NaN, some 448."""
    x = _split(x_MN, block).astype(jnp.float32)
    finite = jnp.abs(x) < jnp.inf
    amax = jnp.max(jnp.where(finite, jnp.abs(x), 0), axis=(-3, -1), keepdims=True)
    scale = _scale(amax, ue8m0, amax_floor)
    y = jnp.where(finite, jnp.clip(x / scale, -MAX, MAX), jnp.nan)
    return _join(y.astype(jnp.float8_e4m3fn), x_MN.shape), jnp.squeeze(scale, (-3, -1))


def quantize_with_integers(
    x_MN: jax.Array, *, block: tuple[int, int], ue8m0: bool, amax_floor: float
) -> tuple[jax.Array, jax.Array]:
    """The same bits without a cast: for |x|, float order is integer order, and `_e4m3_codes` rounds."""
    x = _split(x_MN, block).astype(jnp.float32)
    bits = _bits(x) & 0x7FFFFFFF
    finite = bits < 0x7F800000
    lanes = jnp.where(finite, bits, 0).reshape(*x.shape[:-1], block[1] // _LANES, _LANES).max(axis=-2)
    # The rest as floats, or XLA would merge both maxima into one without lanes.
    amax = jnp.max(_floats(lanes), axis=(-3, -1), keepdims=True)
    scale = _scale(amax, ue8m0, amax_floor)
    codes = jnp.where(finite, _e4m3_codes(x / scale), 0x7F).astype(jnp.uint8)
    return _join(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), x_MN.shape), jnp.squeeze(scale, (-3, -1))


def dequantize(data_MN: jax.Array, scale: jax.Array, block: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """float32(data) * scale, rounded once to `dtype`; `data_MN` may have leading dims."""
    data = _split(data_MN, block).astype(jnp.float32)
    scale = scale.astype(jnp.float32)[..., :, None, :, None]
    return _join((data * scale).astype(dtype), data_MN.shape)


def _scale(amax: jax.Array, ue8m0: bool, amax_floor: float) -> jax.Array:
    scale = jnp.maximum(amax, amax_floor) * jnp.float32(1 / MAX)
    return round_up_to_power_of_two(scale) if ue8m0 else scale


def round_up_to_power_of_two(scale: jax.Array) -> jax.Array:
    """On bits, for positive normal float32: exp2 and log2 are not exact, and a cast to float8_e8m0fnu rounds to nearest."""
    bits = _bits(scale)
    exponent = jnp.clip((bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.uint32), 1, 254)
    return _floats(exponent << 23)


def _e4m3_codes(y: jax.Array) -> jax.Array:
    """Codes (in uint32) of floats within ±464, to nearest even.

    Added to |y|, a power of two 2**20 times that of y (of 2**-6 for a subnormal) leaves y's leading one and three fraction bits at
    the bottom of the sum, rounded by the adder.
    """
    bits = _bits(y)
    magnitude = bits & 0x7FFFFFFF
    power = jnp.maximum(magnitude & 0x7F800000, 121 << 23) + (20 << 23)
    digits = _bits(_floats(magnitude) + _floats(power)) - power
    return digits + (power >> 20) - ((121 + 20) << 3) | (bits >> 24) & 0x80


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


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
