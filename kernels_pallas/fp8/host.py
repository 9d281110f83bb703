"""Weights of files, quantized and dequantized in NumPy: the same bits as the ops on devices, part by part, on one thread.

Every pass over elements is one NumPy call on a piece that stays in a core's cache; such calls release the interpreter's lock, so
several threads can work on several tensors.
"""

import ml_dtypes
import numpy as np

from kernels_pallas.fp8.api import BLOCK, check_floor

_PIECE = 1 << 17  # elements per pass
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_VALUES = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)  # of the 256 codes


def dequantize(
    data_MN: np.ndarray,
    scale: np.ndarray,
    dtype: np.typing.DTypeLike = ml_dtypes.bfloat16,
    *,
    rows: slice = slice(None),
    cols: slice = slice(None),
) -> np.ndarray:
    """float32(data) * scale of some rows and columns of a weight in 128x128 blocks, rounded once to `dtype`.

    Reads that part of `data_MN` [M, N] only, a memory map for example; `scale` [ceil(M / 128), ceil(N / 128)] is float32 or
    float8_e8m0fnu. Where a device flushes a result below float32's normal range to zero, this keeps it.

    Raises ValueError on parts that do not belong together and on slices with a step.
    """
    _check(data_MN, scale)
    (top, bottom), (left, right) = (_bounds(s, size) for s, size in zip((rows, cols), data_MN.shape, strict=True))
    codes_MN = data_MN.view(np.uint8)[top:bottom, left:right]
    out_MN = np.empty(codes_MN.shape, dtype)
    if not out_MN.size:
        return out_MN
    first, last = left // BLOCK, -(-right // BLOCK)
    table_N = (np.arange(left, right) // BLOCK - first) * 256  # where a column's block begins in `values`
    height = max(1, _PIECE // len(table_N))
    index_MN = np.empty((min(height, BLOCK), len(table_N)), np.intp)
    for band in range(top // BLOCK, -(-bottom // BLOCK)):
        with np.errstate(over="ignore", invalid="ignore"):
            values = (_VALUES * scale[band, first:last, None].astype(np.float32)).astype(dtype).reshape(-1)
        start, stop = max(top, band * BLOCK) - top, min(bottom, (band + 1) * BLOCK) - top
        for row in range(start, stop, height):
            piece = slice(row, min(row + height, stop))
            index = index_MN[: piece.stop - row]
            np.copyto(index, codes_MN[piece])
            np.add(index, table_N, out=index)
            np.take(
                values, index, out=out_MN[piece], mode="clip"
            )  # "raise" would go through a buffer; all are in range
    return out_MN


def quantize(w_MN: np.ndarray, *, ue8m0: bool = False, amax_floor: float = 1e-4) -> tuple[np.ndarray, np.ndarray]:
    """(data, scale) of a float32, bfloat16 or float16 weight in 128x128 blocks, as `fp8.quantize_weights` gives them.

    Holds its result and a few pieces, never the whole weight in float32. Raises ValueError on what has no meaning here.
    """
    if w_MN.ndim != 2 or w_MN.dtype not in (np.float32, ml_dtypes.bfloat16, np.float16):
        raise ValueError(f"fp8 quantize needs a float32, bfloat16 or float16 matrix, got {w_MN.dtype} {w_MN.shape}")
    check_floor("fp8 quantize", amax_floor)
    num_rows, num_cols = w_MN.shape
    codes_MN = np.empty(w_MN.shape, np.uint8)
    scale = np.empty((-(-num_rows // BLOCK), -(-num_cols // BLOCK)), np.float32)
    width = _PIECE // BLOCK
    for top in range(0, num_rows, BLOCK):
        for left in range(0, num_cols, width):
            part = slice(top, top + BLOCK), slice(left, left + width)
            blocks = top // BLOCK, slice(left // BLOCK, (left + width) // BLOCK)
            scale[blocks] = _quantize_piece(w_MN[part], codes_MN[part], ue8m0, amax_floor)
    return codes_MN.view(_E4M3), scale


def _quantize_piece(w_MN: np.ndarray, codes_MN: np.ndarray, ue8m0: bool, amax_floor: float) -> np.ndarray:
    """Writes the codes of at most 128 rows, returns the scales of their blocks."""
    x_MN = w_MN.astype(np.float32)
    bits_MN = x_MN.view(np.uint32)
    sign_MN = np.right_shift(bits_MN, 24).astype(np.uint8)
    np.bitwise_and(sign_MN, 0x80, out=sign_MN)
    np.bitwise_and(bits_MN, 0x7FFFFFFF, out=bits_MN)  # x is |w| from here on
    amax_N = x_MN.max(axis=0)
    odd_MN = None
    if not np.isfinite(amax_N).all():
        odd_MN = ~np.isfinite(x_MN)
        x_MN[odd_MN] = 0
        amax_N = x_MN.max(axis=0)
    scale = np.maximum.reduceat(amax_N, range(0, len(amax_N), BLOCK))
    scale = np.maximum(scale, np.float32(amax_floor)) * np.float32(1 / 448)
    if ue8m0:
        exponent = (scale.view(np.uint32) + np.uint32(0x7FFFFF)) >> 23
        scale = (exponent << 23).view(np.float32)
    np.divide(
        x_MN, np.repeat(scale, BLOCK)[: x_MN.shape[1]], out=x_MN
    )  # at most 448.0002: rounds to 448 without a clamp
    _round_to_e4m3(x_MN, codes_MN)
    np.bitwise_or(codes_MN, sign_MN, out=codes_MN)
    if odd_MN is not None:
        codes_MN[odd_MN] = 0x7F
    return scale


def _round_to_e4m3(x_MN: np.ndarray, codes_MN: np.ndarray) -> None:
    """Codes of values in [0, 464), to nearest even; overwrites `x_MN`.

    A power of two 2**20 times that of x (of 2**-6 for a subnormal) added to x leaves, rounded by the adder, x's three fraction
    bits and its leading one at the bottom of the sum.
    """
    bits_MN = x_MN.view(np.uint32)
    power_MN = np.bitwise_and(bits_MN, 0x7F800000)
    np.maximum(power_MN, np.full(power_MN.shape[1], 121 << 23, np.uint32), out=power_MN)  # a row: faster than a scalar
    np.add(power_MN, 20 << 23, out=power_MN)
    np.add(x_MN, power_MN.view(np.float32), out=x_MN)
    np.copyto(codes_MN, bits_MN, casting="unsafe")
    np.right_shift(power_MN, 20, out=power_MN)
    low = power_MN.astype(np.uint8)
    np.add(codes_MN, low, out=codes_MN)
    np.subtract(codes_MN, ((121 + 20) << 3) % 256, out=codes_MN)


def _bounds(part: slice, size: int) -> tuple[int, int]:
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError(f"fp8 dequantize takes slices without a step, got {part}")
    return start, max(start, stop)


def _check(data_MN: np.ndarray, scale: np.ndarray) -> None:
    if data_MN.ndim != 2 or data_MN.dtype != _E4M3 or scale.dtype not in (np.float32, ml_dtypes.float8_e8m0fnu):
        raise ValueError(
            "fp8 dequantize needs a float8_e4m3fn matrix and float32 or float8_e8m0fnu scales, got "
            f"{data_MN.dtype} {data_MN.shape} and {scale.dtype}"
        )
    grid = tuple(-(-size // BLOCK) for size in data_MN.shape)
    if scale.shape != grid:
        raise ValueError(f"fp8 dequantize: a matrix of {data_MN.shape} needs scales {grid}, got {scale.shape}")
