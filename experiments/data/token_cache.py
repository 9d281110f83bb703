"""A tokenized corpus on disk: `tokens.bin` (uint16 or uint32) and the offset of every document, mapped into memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments.data.cache import DamagedError, build_once
from experiments.data.documents import Document, Split
from experiments.tokenizer import Tokenizer

_VERSION = 1  # part of every key: raise it when the files or the rules for making them change
_CHUNK_BYTES = 4_000_000  # text encoded at a time: encoding needs about 100 times as much memory
_SECONDS_BETWEEN_REPORTS = 10.0


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
    """The documents of one split, one after the other. Document d is `tokens[offsets[d]:offsets[d + 1]]`."""

    tokens: np.ndarray
    offsets: np.ndarray  # int64, one more than there are documents
    predicted_bytes: int  # UTF-8 bytes of the text, without those of first tokens that nothing predicts


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """What `tokenize_corpus` made or found."""

    splits: Mapping[Split, TokenizedSplit]
    sha256: str  # of the texts of all documents, wherever they lie


def tokenize_corpus(
    documents: Mapping[Split, Callable[[], Iterable[Document]]],
    identity: str,
    tokenizer: Tokenizer,
    *,
    bos: bool,
    eos: bool,
    cache_dir: pathlib.Path,
    say: Callable[[str], None],
) -> TokenizedCorpus:
    """Tokenizes every split once; the key is `identity`, the tokenizer and the BOS/EOS policy.

    A document of split s becomes [BOS] tokens [EOS]; empty documents are left out. Raises what `documents` raises.
    """
    key = json.dumps([_VERSION, identity, sorted(documents), tokenizer.fingerprint, bos, eos])
    final = cache_dir / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]

    def build(directory: pathlib.Path) -> None:
        started, digest, meta = time.monotonic(), hashlib.sha256(), {}
        for split, read in documents.items():
            (directory / split).mkdir()
            reporter = _Reporter(split, say)
            meta[split] = _write_split(directory / split, reporter.watch(read()), tokenizer, bos, eos, digest)
        meta = {"splits": meta, "corpus_sha256": digest.hexdigest()}
        (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        counts = ", ".join(f"{meta['splits'][s]['num_tokens']:,} {s} tokens" for s in documents)
        say(f"data: tokenized {counts} in {time.monotonic() - started:.1f} s, cached in {final}")

    return build_once(final, build, _load, say)


def _write_split(
    directory: pathlib.Path, documents: Iterable[Document], tokenizer: Tokenizer, bos: bool, eos: bool, digest: Any
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    lengths, predicted_bytes = [0], 0
    with open(directory / "tokens.bin", "wb") as file:
        for chunk in _chunks(documents):
            texts = [document.text for document in chunk]
            for document, text_ids in zip(chunk, tokenizer.encode_batch(texts, bos, eos), strict=True):
                text = document.text.encode()
                digest.update(len(text).to_bytes(8, "little") + text)
                file.write(np.asarray(text_ids, dtype).tobytes())
                lengths.append(len(text_ids))
                predicted_bytes += len(text) - (0 if bos else tokenizer.num_bytes(text_ids[0]))
    offsets = np.cumsum(lengths, dtype=np.int64)
    np.save(directory / "offsets.npy", offsets)
    return {
        "dtype": dtype.name,
        "num_tokens": int(offsets[-1]),
        "predicted_bytes": predicted_bytes,
        "offsets_sha256": hashlib.sha256(offsets.tobytes()).hexdigest(),
    }


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk, size = [], 0
    for document in documents:
        if not document.text:
            continue
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Reporter:
    """Says every few seconds how far a pass over documents has come."""

    def __init__(self, split: Split, say: Callable[[str], None]):
        self._split, self._say, self._last = split, say, time.monotonic()

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        characters = 0
        for count, document in enumerate(documents, start=1):
            yield document
            characters += len(document.text)
            if time.monotonic() - self._last > _SECONDS_BETWEEN_REPORTS:
                self._last = time.monotonic()
                self._say(f"data: {self._split}: {count:,} documents, {characters / 1e6:,.0f} M characters tokenized")


def _load(directory: pathlib.Path) -> TokenizedCorpus:
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        splits = {split: _load_split(directory / split, entry) for split, entry in meta["splits"].items()}
        return TokenizedCorpus(splits=splits, sha256=meta["corpus_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(str(error)) from error


def _load_split(directory: pathlib.Path, entry: dict[str, Any]) -> TokenizedSplit:
    offsets = np.load(directory / "offsets.npy", allow_pickle=False)
    if hashlib.sha256(offsets.tobytes()).hexdigest() != entry["offsets_sha256"] or offsets[-1] != entry["num_tokens"]:
        raise DamagedError("offsets.npy does not match its checksum")
    path, dtype = directory / "tokens.bin", np.dtype(entry["dtype"])
    if path.stat().st_size != entry["num_tokens"] * dtype.itemsize:
        raise DamagedError("tokens.bin has the wrong size")
    # An empty file cannot be mapped.
    tokens = np.memmap(path, dtype, mode="r") if entry["num_tokens"] else np.empty(0, dtype)
    return TokenizedSplit(tokens=tokens, offsets=offsets, predicted_bytes=entry["predicted_bytes"])
