"""Inputs of the FP8 formats and the truth about them, from the definition of e4m3fn and float32 arithmetic in NumPy."""

import math

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
# Values of the codes 0 … 126: 3 fraction bits, exponent bias 7, subnormals at exponent field 0. Code 127 is NaN; bit 7 is the sign.
VALUES = np.array([(c % 8) / 8 * 2**-6 if c < 8 else (1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) for c in range(127)])
BLOCKS = {"activations": (1, 128), "weights": (128, 128)}


def inputs(name: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((260, 300)).astype(np.float32)
    match name:
        case "whole blocks":
            return normal[:256, :256]
        case "partial blocks":
            return normal
        case "half a block too many":
            return rng.standard_normal((192, 192)).astype(np.float32)
        case "less than a block":
            return normal[:3, :5]
        case "one element":
            return normal[:1, :1]
        case "leading dims":
            return rng.standard_normal((2, 3, 130, 140)).astype(np.float32)
        case "bfloat16":
            return normal.astype(ml_dtypes.bfloat16)
        case "float16":
            return normal.astype(np.float16)
        case "zeros of both signs":
            return np.where(normal > 0, 0.0, -0.0).astype(np.float32)
        case "a block of zeros":
            return np.where(np.arange(300) < 128, 0, normal)
        case "below the floor":
            return normal * np.float32(1e-6)
        case "float32 subnormals":
            return normal * np.float32(1e-39)
        case "many magnitudes":  # down to e4m3 subnormals, and to what rounds to zero
            return normal * np.exp2(rng.uniform(-24, 0, normal.shape)).astype(np.float32)
        case "huge":
            return (normal / np.abs(normal).max() * np.finfo(np.float32).max).astype(np.float32)
        case "scales next to powers of two":
            x = np.repeat(np.float32(448) * np.exp2(np.arange(-10, 11, dtype=np.float32)), 3)[:, None]
            x[0::3], x[2::3] = np.nextafter(x[0::3], np.float32(0)), np.nextafter(x[2::3], np.float32(1e9))
            return np.concatenate([x, x * rng.uniform(-1, 1, (len(x), 99)).astype(np.float32)], axis=1)
        case "not finite":
            x = normal.copy()
            x[0, 0], x[5, 130], x[7, 299], x[200, 3], x[259, 299] = np.nan, -np.nan, np.inf, -np.inf, np.nan
            x[11, :128] = np.inf
            return x
        case "a quotient that a reciprocal rounds to another code":
            bits = [[1058949846, 1076111278], [3198589747, 1076676319], [3207299174, 1077941484]]
            return np.array(bits, np.uint32).view(np.float32)
    raise ValueError(name)


NAMES = [
    "whole blocks",
    "partial blocks",
    "half a block too many",
    "less than a block",
    "one element",
    "leading dims",
    "bfloat16",
    "float16",
    "zeros of both signs",
    "a block of zeros",
    "below the floor",
    "float32 subnormals",
    "many magnitudes",
    "huge",
    "scales next to powers of two",
    "not finite",
    "a quotient that a reciprocal rounds to another code",
]


def quantized(
    x: np.ndarray, block: tuple[int, int], ue8m0: bool, amax_floor: float = 1e-4
) -> tuple[np.ndarray, np.ndarray]:
    """(codes in uint8, scales), block by block."""
    *leading, rows, cols = x.shape
    codes = np.zeros(x.shape, np.uint8)
    scale = np.zeros((*leading, -(-rows // block[0]), -(-cols // block[1])), np.float32)
    for index in np.ndindex(scale.shape):
        *batch, i, j = index
        part = (*batch, slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        values = x[part].astype(np.float32)
        finite = np.isfinite(values)
        amax = np.abs(values[finite]).max(initial=np.float32(amax_floor))
        scale[index] = amax * np.float32(1 / 448)
        if ue8m0:
            scale[index] = power_of_two_from(float(scale[index]))
        with np.errstate(invalid="ignore"):
            codes[part] = np.where(finite, nearest_codes(values / scale[index]), 0x7F)
    return codes, scale


def power_of_two_from(x: float) -> float:
    """The smallest that is not less than x."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(1.0, exponent - (fraction == 0.5))


def nearest_codes(y: np.ndarray) -> np.ndarray:
    """Codes of the nearest values, of the even code for a tie, of ±448 beyond."""
    middles = (VALUES[1:] + VALUES[:-1]) / 2
    magnitude = np.minimum(np.nan_to_num(np.abs(y)).astype(np.float64), 448)
    codes = np.searchsorted(middles, magnitude)
    tie = np.isin(magnitude, middles) & (codes % 2 == 1)
    return (codes + tie + 128 * np.signbit(y)).astype(np.uint8)


def values_of(codes: np.ndarray) -> np.ndarray:
    """float32 values of codes."""
    magnitude = np.append(VALUES, np.nan)[codes % 128]
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


def rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 bits of x rounded to nearest even at bit 16."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    below, even = bits & 0xFFFF, bits >> 16
    even += (below > 0x8000) | ((below == 0x8000) & (even % 2 == 1))
    return np.where(np.isnan(x), np.float32(np.nan), (even << 16).astype(np.uint32).view(np.float32))
