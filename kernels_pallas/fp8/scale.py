"""The scale of a block, and dividing by it, in operations that XLA and both Mosaics have: no unsigned maxima, no exp2."""

import jax
import jax.numpy as jnp

MAX = 448.0  # the largest e4m3fn


def scale_of(amax: jax.Array, ue8m0: bool, amax_floor: float) -> jax.Array:
    """max(amax, amax_floor) / 448 in float32, rounded up to a power of two if `ue8m0`; the floor keeps it a normal float."""
    scale = jnp.maximum(amax, amax_floor) * jnp.float32(1 / MAX)
    return round_up_to_power_of_two(scale) if ue8m0 else scale


def round_up_to_power_of_two(x: jax.Array) -> jax.Array:
    """On bits, for positive normal float32: exp2 and log2 are not exact, and a cast to float8_e8m0fnu rounds to nearest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def divide(x: jax.Array, scale: jax.Array, finite: jax.Array, ue8m0: bool) -> jax.Array:
    """x / scale where `finite`; exact with powers of two on every device.

    With others it is IEEE's quotient where a device has that division. PTX as Mosaic GPU writes it (div.full) is within 2 ulp, and
    a code may then be its neighbour. A divisor that is a mere broadcast, XLA would replace by a factor: another rounding.
    """
    if not ue8m0:
        return x / jnp.where(finite, scale, jnp.float32(1))
    reciprocal = 0x7F000000 - jax.lax.bitcast_convert_type(scale, jnp.int32)
    return x * jax.lax.bitcast_convert_type(reciprocal, jnp.float32)
