"""Rows of a fixed length, cut from a tokenized split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.data.token_cache import TokenizedSplit

Row = dict[str, np.ndarray]


class Windows(Sequence[Row]):
    """Row i holds the L + 1 tokens from i * L on: `tokens`, `segment_ids` and `positions`, int32 [L + 1] each.

    Neighbouring rows share one token, the last target of one and the first input of the next, so that every token
    except a document's first is a target exactly once. Segments stand for documents and count from 1 in each row.
    Positions restart with each segment, so at a row's start as well, and never exceed L. Padding is segment 0, and
    exists only in the last row.
    """

    def __init__(self, split: TokenizedSplit, seq_len: int, *, keep_last: bool):
        """`keep_last` pads the last, partial row; without it that row is dropped, unless it is the only one."""
        self._split, self._seq_len = split, seq_len
        targets = max(len(split.tokens) - 1, 0)
        full, rest = divmod(targets, seq_len)
        self._len = full + (1 if rest and (keep_last or not full) else 0)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < self._len:
            raise IndexError(index)
        start = index * self._seq_len
        stop = min(start + self._seq_len + 1, len(self._split.tokens))
        row = {name: np.zeros(self._seq_len + 1, np.int32) for name in ("tokens", "segment_ids", "positions")}
        row["tokens"][: stop - start] = self._split.tokens[start:stop]
        first, last = np.searchsorted(self._split.offsets, (start, stop - 1), side="right")
        starts = np.concatenate(([0], self._split.offsets[first:last] - start))  # of the segments, within the row
        lengths = np.diff(starts, append=stop - start)
        row["segment_ids"][: stop - start] = np.repeat(np.arange(1, len(starts) + 1), lengths)
        row["positions"][: stop - start] = np.arange(stop - start) - np.repeat(starts, lengths)
        return row
