"""The FP8 formats in plain JAX, blocks as dims of their own.

Devices that cast FP8 in hardware get the formulas as they stand. XLA:CPU emulates the casts and takes float maxima one by one, so
there the same bits are made with integers: `quantize` in a quarter of the time, `dequantize` in two thirds.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.fp8.scale import MAX, scale_of

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
    *leading, rows, columns = x_MN.shape
    m, n = -(-rows // block[0]), -(-columns // block[1])
    x = _pad(_pad(x_MN, -2, m * block[0]), -1, n * block[1]).astype(jnp.float32)
    x = x.reshape(*leading, m, block[0], n, block[1])
    finite = jnp.abs(x) < jnp.inf
    scale = scale_of(jnp.max(jnp.where(finite, jnp.abs(x), 0), axis=(-3, -1), keepdims=True), ue8m0, amax_floor)
    y = jnp.where(finite, jnp.clip(_divide(x, scale, finite), -MAX, MAX), jnp.nan)
    data_MN = y.astype(jnp.float8_e4m3fn).reshape(*leading, m * block[0], n * block[1])
    return data_MN[..., :rows, :columns], jnp.squeeze(scale, (-3, -1))


def quantize_with_integers(
    x_MN: jax.Array, *, block: tuple[int, int], ue8m0: bool, amax_floor: float
) -> tuple[jax.Array, jax.Array]:
    """The same bits without a cast or a copy for padding: for |x|, the order of integers is that of floats."""
    x_MN = x_MN.astype(jnp.float32)
    bits_MN = _bits(x_MN) & 0x7FFFFFFF
    finite_MN = bits_MN < 0x7F800000
    scale = scale_of(_block_max(jnp.where(finite_MN, bits_MN, 0), block), ue8m0, amax_floor)
    codes_MN = _e4m3_codes(_divide(x_MN, _spread(scale, block, x_MN.shape), finite_MN))
    codes_MN = jnp.where(finite_MN, codes_MN, 0x7F).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(codes_MN, jnp.float8_e4m3fn), scale


def dequantize(data_MN: jax.Array, scale: jax.Array, block: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """float32(data) * scale, rounded once to `dtype`; `data_MN` may have leading dims."""
    scale_MN = _spread(scale.astype(jnp.float32), block, data_MN.shape)
    value_MN = jax.lax.platform_dependent(
        data_MN, cpu=values_with_integers, default=lambda data_MN: data_MN.astype(jnp.float32)
    )
    return (value_MN * scale_MN).astype(dtype)


def values_with_integers(data: jax.Array) -> jax.Array:
    """e4m3 values in float32 without a cast: exponent and fraction moved into place, subnormals as whole multiples of 2**-9."""
    codes = jax.lax.bitcast_convert_type(data, jnp.uint8).astype(jnp.uint32)
    magnitude = codes & 0x7F
    normal = (magnitude << 20) + (120 << 23)
    bits = jnp.where(magnitude < 8, _bits(magnitude.astype(jnp.float32) * jnp.float32(2**-9)), normal)
    bits = jnp.where(magnitude == 0x7F, 0x7FC00000, bits)
    return _floats(bits | (codes & 0x80) << 24)


def _divide(x: jax.Array, scale: jax.Array, finite: jax.Array) -> jax.Array:
    """x / scale where finite. XLA would turn a quotient by a mere broadcast into a product with reciprocals, another rounding."""
    return x / jnp.where(finite, scale, 1)


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


def _block_max(bits_MN: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Maxima of blocks of non-negative floats given as bits: across vectors as integers, the rest as floats.

    (If both were integers, XLA would merge them into one maximum without vectors.)
    """
    *leading, rows, columns = bits_MN.shape
    m, n, whole = -(-rows // block[0]), -(-columns // block[1]), columns // block[1]
    edge_MN = bits_MN[..., whole * block[1] :]
    lanes = [
        part_MN.reshape(*leading, rows, blocks, block[1] // _LANES, _LANES).max(axis=-2)
        for part_MN, blocks in (
            (bits_MN[..., : whole * block[1]], whole),
            (_pad(edge_MN, -1, (n - whole) * block[1]), n - whole),
        )
    ]
    lanes = _floats(_pad(jnp.concatenate(lanes, axis=-2), -3, m * block[0]))
    return lanes.reshape(*leading, m, block[0], n, _LANES).max(axis=(-3, -1))


def _spread(scale: jax.Array, block: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """The scale of every element."""
    return jnp.repeat(jnp.repeat(scale, block[0], axis=-2), block[1], axis=-1)[..., : shape[-2], : shape[-1]]


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind x up to `size` along an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
