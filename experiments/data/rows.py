"""The endless, shuffled stream of training rows whose position is one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.data.windows import Row, Windows
from experiments.errors import UserError

if TYPE_CHECKING:
    import grain


def member_seed(seed: int, member: int) -> int:
    """A 32-bit seed for one member of a mixture, far from the others: Grain adds one to it every epoch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{member}".encode()).digest()[:4], "big")


def global_rows(members: Sequence[Windows], weights: Sequence[float], seed: int) -> grain.MapDataset[Row]:
    """Row g of training, for every g: a pure function of the corpus, the weights and the seed."""
    import grain

    parts = [
        grain.MapDataset.source(windows).shuffle(member_seed(seed, number)).repeat()
        for number, windows in enumerate(members)
    ]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def local_count(num_rows: int, process_count: int) -> int:
    """Rows of this process; UserError if they do not divide evenly."""
    if num_rows < 1 or num_rows % process_count:
        raise UserError(f"train.batch_size: {num_rows} rows do not divide among {process_count} processes")
    return num_rows // process_count


class CachedStream:
    """Serves the rows after global example index `index`, this process's slice of them, with threads reading ahead.

    Processes hold contiguous slices in order, so that together they are the rows that one process would get. Nothing
    but `index` is state: resume with any process count and any batch size.
    """

    def __init__(
        self,
        rows: grain.MapDataset[Row],
        index: int,
        *,
        process_index: int,
        process_count: int,
        num_threads: int,
        num_prefetched: int,
    ):
        self.index = index
        self._rows, self._process_index, self._process_count = rows, process_index, process_count
        self._num_threads, self._num_prefetched = num_threads, num_prefetched
        self._num_rows = 0
        self._batches: Any = None

    @property
    def state(self) -> dict[str, int]:
        """JSON-serialisable; `Data.train_stream(state)` continues from here."""
        return {"index": self.index}

    def next_rows(self, num_rows: int) -> Row:
        """This process's share of the next `num_rows` rows: int32 [num_rows / process_count, L + 1] each.

        Reading ahead assumes that the next call asks for as many rows; another number costs one start of the reader.
        """
        if self._batches is None or num_rows != self._num_rows:
            self.close()
            self._batches, self._num_rows = self._read_ahead(num_rows), num_rows
        batch = next(self._batches)
        self.index += num_rows
        return batch

    def _read_ahead(self, num_rows: int) -> Iterator[Row]:
        import grain

        num_local = local_count(num_rows, self._process_count)
        batches = self._rows[self.index :].batch(num_local, drop_remainder=True)[
            self._process_index :: self._process_count
        ]
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=self._num_prefetched)
        return iter(batches.to_iter_dataset(options))

    def close(self) -> None:
        """Stops the threads; the stream can still be read on."""
        if self._batches is not None:
            self._batches.close()
        self._batches, self._num_rows = None, 0


def stack(rows: Sequence[Row]) -> Row:
    """Rows [L + 1] as one [n, L + 1]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
