"""Between tensors as Hugging Face files hold them and parts of our arrays: which rows belong where, and turning them fast."""

import math

import numpy as np

from mdl.hf.table import Layout

_ROWS = 32  # turned at a time: as many as there are cache lines for; measured best for items of 1, 2 and 4 bytes


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


def copy_to_ours(tensor: np.ndarray, layout: Layout, ours: np.ndarray) -> None:
    """ours[...] = tensor, in our order of dims. `ours` is contiguous."""
    if _swaps(layout):
        _turn(tensor, ours.reshape(tensor.shape[::-1]))
    else:
        ours[...] = layout.read(tensor, ours.shape)


def to_theirs(ours: np.ndarray, layout: Layout) -> np.ndarray:
    """The tensor, contiguous, that holds a part of ours, contiguous."""
    shape = layout.shape_on_disk(ours.shape)
    if not _swaps(layout):
        return np.ascontiguousarray(layout.write(ours))
    tensor = np.empty(shape, ours.dtype)
    _turn(ours.reshape(shape[::-1]), tensor)
    return tensor


def _swaps(layout: Layout) -> bool:
    """Whether ours is the transposed matrix, its dims split or not. So are all layouts of matrices today."""
    return len(layout.groups) == 2 and layout.ours == layout.groups[1] + layout.groups[0]


def _turn(source_MN: np.ndarray, target_NM: np.ndarray) -> None:
    """target_NM[...] = source_MN.T, twice as fast as all at once."""
    for begin in range(0, len(source_MN), _ROWS):
        target_NM[:, begin : begin + _ROWS] = source_MN[begin : begin + _ROWS].T
