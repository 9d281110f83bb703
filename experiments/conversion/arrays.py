"""Sizes and sums of tensors."""

import math

import numpy as np

Size = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of one tensor


def num_bytes(size: Size) -> int:
    dtype, shape = size
    return math.prod(shape) * dtype.itemsize


def sum_of_words(array: np.ndarray) -> int:
    """The checksum of `layers_on_disk.checksums`: the sum of the array's bits, as words, modulo 2**32. C order needed."""
    word = np.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    return int(np.sum(array.reshape(-1).view(word), dtype=np.uint32))


def split(length: int, limit: int) -> list[range]:
    """0..length in equal ranges (the last may be shorter) of at most `limit`, at least 1, each."""
    parts = max(1, math.ceil(length / max(limit, 1)))
    step = max(1, math.ceil(length / parts))
    return [range(begin, min(begin + step, length)) for begin in range(0, max(length, 1), step)]
