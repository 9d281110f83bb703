"""Tensors that should hold what another one holds, such as MTP's copies of the embedding: they are not converted, but compared."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.conversion.arrays import num_bytes, split
from experiments.conversion.naming import NamedTensor
from experiments.conversion.sources import Source
from experiments.conversion.work import Piece

_PIECE_BYTES = 32 << 20  # of each of the two


@dataclasses.dataclass(frozen=True)
class Copy:
    """A unit of work that writes nothing and says if the two differ."""

    source: Source
    tensor: str
    original: str
    say: Callable[[str], None]

    @property
    def name(self) -> str:
        return self.tensor

    @property
    def num_bytes(self) -> int:
        return 0

    def begin(self) -> "_CopyJob":
        return _CopyJob(self)

    def verify(self, sums: Mapping[str, int]) -> bool:
        return True


class _CopyJob:
    def __init__(self, copy: Copy):
        self._copy = copy
        self._differs = False
        dtype, shape = copy.source.sizes[copy.tensor]
        row_bytes = num_bytes((dtype, shape[1:]))
        ranges = split(shape[0], _PIECE_BYTES // max(1, row_bytes))
        self.pieces = [Piece(2 * len(rows) * row_bytes, functools.partial(self._run, rows)) for rows in ranges]

    def _run(self, rows: range) -> int:
        one, other = (self._copy.source.read(name, rows) for name in (self._copy.tensor, self._copy.original))
        if one.dtype != other.dtype or not np.array_equal(one.view(np.uint8), other.view(np.uint8)):
            self._differs = True
        return 0

    def finish(self) -> dict[str, int]:
        if self._differs:
            self._copy.say(
                f"{self._copy.tensor} should be a copy of {self._copy.original} and is not; nobody reads it, it is left out"
            )
        return {}

    def abandon(self) -> None:
        pass


def find_copies(tensors: Sequence[NamedTensor], source: Source, say: Callable[[str], None]) -> list[Copy]:
    """Those that the source holds."""
    originals = {(t.array, t.index): t.tensor for t in tensors if not t.is_copy}
    return [
        Copy(source, t.tensor, originals[t.array, t.index], say)
        for t in tensors
        if t.is_copy and t.tensor in source.sizes
    ]
