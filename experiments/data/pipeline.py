"""From a corpus and a tokenizer to training batches and held-out rows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from experiments.data.cache import default_cache_dir
from experiments.data.documents import Document, Source, Split, documents
from experiments.data.rows import CachedStream, global_rows
from experiments.data.sources import MixtureConfig, SourceConfig, StdlibConfig
from experiments.data.token_cache import TokenizedCorpus, tokenize_corpus
from experiments.data.windows import Row, Windows
from experiments.errors import UserError
from experiments.paths import local_path
from experiments.tokenizer import BpeTokenizerConfig, Tokenizer, TokenizerConfig


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on and how it is read."""

    source: SourceConfig = dataclasses.field(default_factory=StdlibConfig)  # the corpus
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=BpeTokenizerConfig)  # text to tokens
    bos: bool = False  # put BOS before every document
    eos: bool = True  # put EOS after every document, if the tokenizer has one
    validation_max_bytes: int = 10_000_000  # evaluate on the first so many bytes of held-out documents (per corpus)
    cache_dir: str | None = None  # for tokens and trained tokenizers; None is $XDG_CACHE_HOME/mdl or ~/.cache/mdl
    num_threads: int = 2  # threads that read ahead
    num_prefetched: int = 4  # batches read ahead
    streaming: bool = False  # tokenize while training instead of before: for corpora too large for the disk
    num_workers: int = 0  # processes that tokenize, when streaming; 0 tokenizes in the training process
    shuffle_window: int = 1000  # documents shuffled at a time, when streaming

    def __post_init__(self):
        for name in ("validation_max_bytes", "num_threads", "num_prefetched", "shuffle_window"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: must be at least 1")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers}: must be at least 0")
        if self.num_workers and not self.streaming:
            raise UserError(f"data.num_workers={self.num_workers}: only streaming has workers; set data.streaming=True")

    def build(
        self,
        seq_len: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        say: Callable[[str], None] = _say,
    ) -> Data:
        """Reads, tokenizes and caches the corpus, or finds it in the cache. `say` gets lines of progress.

        `seq_len` is L, the number of predictions in a row of L + 1 tokens. UserError for every fault of the corpus.
        """
        return Data(self, seq_len, seed, process_index, process_count, say)


class TrainStream(Protocol):
    """Training rows in order; see CachedStream and PackedStream."""

    @property
    def index(self) -> int: ...  # rows served so far, over all processes

    @property
    def state(self) -> dict[str, Any]: ...  # JSON-serialisable

    def next_rows(self, num_rows: int) -> Row: ...

    def close(self) -> None: ...


class Data:
    """A tokenized corpus.

    Bits per byte: (sum of the negative log likelihoods in nats of every target in `validation_rows()`) / ln 2 /
    `validation_bytes`. The bytes are those of the held-out text, without each document's first token where no BOS
    precedes it, since nothing predicts that token. EOS is predicted, so it counts among the bits and has no bytes.
    """

    def __init__(
        self,
        config: DataConfig,
        seq_len: int,
        seed: int,
        process_index: int,
        process_count: int,
        say: Callable[[str], None],
    ):
        if seq_len < 1:
            raise UserError(f"train.seq_len={seq_len}: must be at least 1")
        source = config.source
        members, self._weights = (
            (source.members, source.weights) if isinstance(source, MixtureConfig) else ((source,), (1.0,))
        )
        self._config, self._seq_len, self._seed = config, seq_len, seed
        self._process_index, self._process_count = process_index, process_count
        self._sources: Sequence[Source] = [member.build() for member in members]
        for source in self._sources:
            _check_not_empty(source)
        cache_dir = (
            local_path(config.cache_dir, "data.cache_dir").expanduser() if config.cache_dir else default_cache_dir()
        )
        identity = hashlib.sha256("\n".join(source.identity for source in self._sources).encode()).hexdigest()
        self.tokenizer: Tokenizer = config.tokenizer.build(self._train_texts, identity, cache_dir, say)
        self._eos = config.eos and self.tokenizer.eos_id is not None
        if config.bos:
            self.tokenizer.encode("", bos=True)  # UserError if it has none
        self._corpora = [self._tokenize(source, cache_dir, say) for source in self._sources]

    def _tokenize(self, source: Source, cache_dir: pathlib.Path, say: Callable[[str], None]) -> TokenizedCorpus:
        limit = self._config.validation_max_bytes
        read: dict[Split, Callable[[], Iterator[Document]]] = {
            "validation": lambda: _first_bytes(documents(source, "validation"), limit)
        }
        if not self._config.streaming:
            read["train"] = lambda: documents(source, "train")
        return tokenize_corpus(
            read,
            f"{source.identity}/{limit}",
            self.tokenizer,
            bos=self._config.bos,
            eos=self._eos,
            cache_dir=cache_dir,
            say=say,
        )

    def _train_texts(self) -> Iterator[str]:
        # In turns, so that a limit on the bytes does not train the tokenizer on the first member alone.
        rounds = itertools.zip_longest(*(documents(source, "train") for source in self._sources))
        return (document.text for group in rounds for document in group if document is not None)

    @functools.cached_property
    def corpus_sha256(self) -> str:
        """Hash of the texts of all documents read: everything, or when streaming the held-out part."""
        return hashlib.sha256("\n".join(corpus.sha256 for corpus in self._corpora).encode()).hexdigest()

    @property
    def shards(self) -> list[str]:
        """Names of the parts of the training documents, such as files, of every member."""
        return [name for source in self._sources for name in source.shards("train")]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides about training row g, but the seed: the same hash and seed give the same rows."""
        config = self._config
        content = [self.corpus_sha256, self.tokenizer.fingerprint, config.bos, self._eos, self._seq_len]
        content += [self._weights, config.streaming, [s.identity for s in self._sources] if config.streaming else []]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @functools.cached_property
    def _train_windows(self) -> list[Windows]:
        return [Windows(c.splits["train"], self._seq_len, keep_last=False) for c in self._corpora]

    @property
    def num_train_rows(self) -> int | None:
        """Rows of one pass over every member; None when streaming, where nobody has counted."""
        return None if self._config.streaming else sum(len(windows) for windows in self._train_windows)

    @property
    def tokens_per_epoch(self) -> int | None:
        """Training tokens; None when streaming."""
        return None if self._config.streaming else sum(len(c.splits["train"].tokens) for c in self._corpora)

    def train_stream(self, start: int | Mapping[str, Any] = 0) -> TrainStream:
        """The rows from a global example index on, or from the `state` of an earlier stream. Close it when done.

        UserError if the state belongs to the other kind of stream or, when streaming, to other workers or processes.
        """
        state = {"index": start} if isinstance(start, int) else start
        if self._config.streaming:
            return self._packed_stream(state)
        if set(state) != {"index"}:
            raise UserError("data.streaming=False: this position was saved with data.streaming=True; set it again")
        return CachedStream(
            global_rows(self._train_windows, self._weights, self._seed),
            state["index"],
            process_index=self._process_index,
            process_count=self._process_count,
            num_threads=self._config.num_threads,
            num_prefetched=self._config.num_prefetched,
        )

    def _packed_stream(self, state: Mapping[str, Any]) -> TrainStream:
        from experiments.data.streaming import PackedStream

        return PackedStream(
            self._sources,
            self._weights,
            self.tokenizer,
            state,
            seq_len=self._seq_len,
            seed=self._seed,
            bos=self._config.bos,
            eos=self._eos,
            process_index=self._process_index,
            process_count=self._process_count,
            num_workers=self._config.num_workers,
            num_prefetched=self._config.num_prefetched,
            shuffle_window=self._config.shuffle_window,
        )

    def validation_rows(self) -> Sequence[Row]:
        """Every held-out row [L + 1], in order; the same in every process. Empty if nothing is held out."""
        return _Joined([Windows(c.splits["validation"], self._seq_len, keep_last=True) for c in self._corpora])

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes that the targets of `validation_rows()` stand for."""
        return sum(c.splits["validation"].predicted_bytes for c in self._corpora)

    def validation_texts(self) -> Iterator[str]:
        """The held-out documents that `validation_rows()` holds as tokens."""
        limit = self._config.validation_max_bytes
        return (d.text for source in self._sources for d in _first_bytes(documents(source, "validation"), limit))


class _Joined(Sequence[Row]):
    def __init__(self, members: Sequence[Windows]):
        self._members = members

    def __len__(self) -> int:
        return sum(len(member) for member in self._members)

    def __getitem__(self, index: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        for member in self._members:
            if index < len(member):
                return member[index]
            index -= len(member)
        raise IndexError(index)


def _check_not_empty(source: Source) -> None:
    if not any(document.text for document in documents(source, "train")):
        raise UserError("data.source: the corpus is empty, there is no document to train on; check what it holds out")
    if source.shards("validation") and not any(document.text for document in documents(source, "validation")):
        raise UserError(
            "data.source: no document is held out; give validation_paths or a larger validation_fraction, cut files "
            "into more documents, or set validation_fraction=0 to go without validation"
        )


def _first_bytes(found: Iterator[Document], limit: int) -> Iterator[Document]:
    """Whole documents until their bytes reach the limit."""
    seen = 0
    for document in found:
        if seen >= limit:
            return
        seen += len(document.text.encode())
        yield document
