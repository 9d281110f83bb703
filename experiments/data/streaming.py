"""Training rows from a corpus that is tokenized while it is read: no cache, but positions fit only their own layout."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from experiments.data.documents import Source
from experiments.data.rows import local_count, member_seed, stack
from experiments.data.windows import Row
from experiments.errors import UserError
from experiments.tokenizer import Tokenizer


class PackedStream:
    """Each process reads its own share of the documents and packs them into rows of L + 1 tokens.

    Rows do not overlap, so their first tokens are never targets. The position is Grain's own: it fits only the same
    number of processes and workers, and every process must save its own.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        tokenizer: Tokenizer,
        state: Mapping[str, Any],
        *,
        seq_len: int,
        seed: int,
        bos: bool,
        eos: bool,
        process_index: int,
        process_count: int,
        num_workers: int,
        num_prefetched: int,
        shuffle_window: int,
    ):
        """`state` is `{"index": 0}` or an earlier `state` of this process. UserError if it does not fit."""
        self._process_index, self._process_count, self._num_workers = process_index, process_count, num_workers
        self.index = state["index"]
        self._start, self._position = state, self._checked(state)
        self._num_prefetched = num_prefetched
        self._ahead: grain.DatasetIterator | None = None
        if num_workers:
            _let_grain_read_its_flags()
        packed = []
        for number, source in enumerate(sources):
            start, member = slice(process_index, None, process_count), member_seed(seed, number)
            texts = grain.experimental.WindowShuffleIterDataset(
                TextDataset(source, member, start), window_size=shuffle_window, seed=member
            )
            tokens = texts.map(_Tokenize(tokenizer, bos, eos))
            if num_workers:  # before packing, so that workers split documents and not rows
                tokens = tokens.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
            packed.append(grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct={"tokens": seq_len + 1}))
        self._rows = packed[0] if len(packed) == 1 else grain.IterDataset.mix(packed, weights)

    def _checked(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        if state == {"index": 0}:
            return None
        if "iterator" not in state:
            raise UserError("data.streaming=True: this position was saved with data.streaming=False; set it again")
        for name, saved, now in (
            ("data.num_workers", state["num_workers"], self._num_workers),
            ("the number of processes", state["process_count"], self._process_count),
            ("the process index", state["process_index"], self._process_index),
        ):
            if saved != now:
                raise UserError(f"{name} is {now}, but this streaming position fits only {saved}; use {saved} again")
        return _from_json(state["iterator"])

    @property
    def state(self) -> dict[str, Any]:
        """JSON-serialisable; every process has its own."""
        if self._ahead is None:
            return dict(self._start)
        return {
            "index": self.index,
            "num_workers": self._num_workers,
            "process_count": self._process_count,
            "process_index": self._process_index,
            "iterator": self._ahead.get_state(),
        }

    def next_rows(self, num_rows: int) -> Row:
        """This process's share of `num_rows` rows: int32 [num_rows / process_count, L + 1] each."""
        num_local = local_count(num_rows, self._process_count)
        if self._ahead is None:
            self._ahead = self._read_ahead(num_local)
        rows = [next(self._ahead) for _ in range(num_local)]
        self.index += num_rows
        names = {"tokens": "tokens", "segment_ids": "tokens_segment_ids", "positions": "tokens_positions"}
        return stack([{name: row[theirs] for name, theirs in names.items()} for row in rows])

    def _read_ahead(self, num_local: int) -> grain.DatasetIterator:
        buffer = self._num_prefetched * num_local
        ahead = iter(grain.experimental.ThreadPrefetchIterDataset(self._rows, prefetch_buffer_size=buffer))
        if self._position is not None:
            ahead.set_state(self._position)
        return ahead

    def close(self) -> None:
        """Stops the reading thread and the workers; a new stream continues from `state`."""
        if self._ahead is not None:
            self._start, self._position = self.state, self._ahead.get_state()
            self._ahead.close()
        self._ahead = None  # a Grain iterator that lives until the interpreter ends complains there


class TextDataset(grain.IterDataset[str]):
    """The training texts of a source, over and over, its shards in another order each time.

    A slice start::step takes every step-th shard if there are enough of them, else every step-th document.
    """

    def __init__(self, source: Source, seed: int, part: slice):
        super().__init__()
        self._source, self._seed = source, seed
        self._start, self._step = part.start, part.step

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Grain calls it in a worker to say which part of the part is its own."""
        del sequential_slice
        self._start, self._step = self._start + sl.start * self._step, self._step * sl.step

    def __iter__(self) -> grain.DatasetIterator[str]:
        return _TextIterator(self._source, self._seed, self._start, self._step)


class _TextIterator(grain.DatasetIterator[str]):
    def __init__(self, source: Source, seed: int, start: int, step: int):
        super().__init__()
        self._source, self._seed = source, seed
        num_shards = len(source.shards("train"))
        by_shard = num_shards >= step
        self._shards = range(start, num_shards, step) if by_shard else range(num_shards)
        self._offset, self._stride = (0, 1) if by_shard else (start, step)
        self.set_state({"epoch": 0, "shard": 0, "document": 0})

    def get_state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "shard": self._shard, "document": self._document}

    def set_state(self, state: dict[str, int]) -> None:
        self._epoch, self._shard, self._document = state["epoch"], state["shard"], state["document"]
        self._texts: Iterator[tuple[int, str]] | None = None

    def __next__(self) -> str:
        empty_epochs = 0
        while True:
            if self._texts is None:
                self._texts = self._open()
            if (found := next(self._texts, None)) is not None:
                self._document, text = found
                return text
            self._texts, self._document = None, 0
            self._shard += 1
            if self._shard == len(self._shards):
                self._epoch, self._shard, empty_epochs = self._epoch + 1, 0, empty_epochs + 1
            if empty_epochs > 1:
                raise UserError("data.source: too few documents for so many processes and workers; use fewer")

    def _open(self) -> Iterator[tuple[int, str]]:
        """Texts of the current shard from the current document on, each with the number of the document after it."""
        order = sorted(self._shards, key=lambda shard: _hash(self._seed, self._epoch, shard))
        found = enumerate(self._source.read("train", order[self._shard]))
        for number, document in itertools.islice(found, self._document, None):
            if number % self._stride == self._offset and document.text:
                yield number + 1, document.text


class _Tokenize(grain.transforms.Map):
    def __init__(self, tokenizer: Tokenizer, bos: bool, eos: bool):
        self._tokenizer, self._bos, self._eos = tokenizer, bos, eos

    def map(self, element: str) -> dict[str, np.ndarray]:
        return {"tokens": np.asarray(self._tokenizer.encode(element, self._bos, self._eos), np.int32)}


def _hash(*parts: int) -> bytes:
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()


def _from_json(state: Any) -> Any:
    """Grain's packing compares its slices with tuples, which JSON turned into lists; the rest has lists."""
    if isinstance(state, list):
        return [_from_json(part) for part in state]
    if not isinstance(state, dict):
        return state
    return {
        key: {name: tuple(ends) for name, ends in part.items()} if key == "remainder_slices" else _from_json(part)
        for key, part in state.items()
    }


def _let_grain_read_its_flags() -> None:
    """Grain's worker processes read an absl flag, which fails unless absl has parsed a command line."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
