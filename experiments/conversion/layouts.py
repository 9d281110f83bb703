"""Between tensors as Hugging Face files hold them and parts of our arrays: which rows belong where, and turning them fast."""

import math

import jax
import numpy as np

from mdl.hf.table import Layout

MATRIX = Layout("MN -> MN")  # of scales, which we hold as the files do


def spell(layout: Layout) -> str:
    """The text that `Layout` reads."""
    groups = [group if len(group) == 1 else f"({group})" for group in layout.groups]
    return f"{''.join(groups)} -> {layout.ours}"


def row_step(layout: Layout, shape: tuple[int, ...]) -> int:
    """Rows of a tensor that one index of its slowest dim covers, for ours of `shape`: more than 1 where dims are merged."""
    sizes = dict(zip(layout.ours, shape, strict=True))
    return math.prod(sizes[dim] for dim in layout.groups[0][1:])


def rows_of_ours(layout: Layout, shape: tuple[int, ...], rows: range) -> tuple[slice, ...]:
    """Where some rows of the tensor lie in ours of `shape`; rows begin and end at multiples of `row_step`."""
    step = row_step(layout, shape)
    cut = slice(rows.start // step, rows.stop // step)
    return tuple(cut if dim == layout.theirs[0] else slice(None) for dim in layout.ours)


def to_ours(tensor: np.ndarray, layout: Layout) -> np.ndarray:
    """Some rows of a tensor, or all, contiguous in our order of dims. Merged dims stay merged: reshape."""
    return _turned(tensor) if _swaps(layout) else tensor


def to_theirs(ours: np.ndarray, layout: Layout) -> np.ndarray:
    """The tensor, contiguous, that holds a part of ours, contiguous."""
    shape = layout.shape_on_disk(ours.shape)
    return _turned(ours.reshape(shape[::-1])) if _swaps(layout) else ours.reshape(shape)


def _swaps(layout: Layout) -> bool:
    """Whether ours is the transposed matrix, its dims split or not; otherwise it lies in memory as the tensor does."""
    if len(layout.groups) == 2 and layout.ours == layout.groups[1] + layout.groups[0]:
        return True
    if layout.ours == layout.theirs:
        return False
    raise NotImplementedError(f"{spell(layout)}: only matrices that are transposed or not are converted")


def _turned(matrix: np.ndarray) -> np.ndarray:
    """A transposed copy. XLA makes it as it takes the view over, in a third of the time that NumPy needs."""
    words = matrix.view(f"uint{8 * matrix.dtype.itemsize}")
    return np.asarray(jax.device_put(words.T, jax.local_devices(backend="cpu")[0])).view(matrix.dtype)
