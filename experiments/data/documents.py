"""What a corpus is to the rest of the pipeline: named documents in two splits, read shard by shard."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from experiments.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    File = pathlib.Path | epath.Path  # on a disk, or in an object store

Split = Literal["train", "validation"]
_HASH_RANGE = 2**64
_STORES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # object stores that fsspec reads, and with which package


class Document(NamedTuple):
    """A text that is modelled on its own; `name` says where it came from."""

    name: str
    text: str


class Source(Protocol):
    """A corpus. It must be picklable: streaming workers read their own copy."""

    @property
    def identity(self) -> str:
        """A hash that changes when the documents do. Cheap: large files count by path, size and time of change."""
        ...

    def shards(self, split: Split) -> Sequence[str]:
        """Names of the parts that can be read apart from each other, such as files."""
        ...

    def read(self, split: Split, shard: int) -> Iterator[Document]:
        """The documents of one shard, always in the same order. UserError names the file and line that is bad."""
        ...


def documents(source: Source, split: Split) -> Iterator[Document]:
    """All documents of a split, in order."""
    for shard in range(len(source.shards(split))):
        yield from source.read(split, shard)


class FileSource:
    """Files that `read_file` turns into documents; some documents are held out for validation.

    With `validation_paths` those files are held out. Without, a document is held out by the hash of its text, so that
    the split is the same on every machine and copies of a document never end up on both sides.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        validation_paths: tuple[str, ...],
        validation_fraction: float,
        settings: Any,
        read_file: Callable[[File], Iterator[Document]],
    ):
        """`settings` are the other fields of the config: what else decides about the documents. JSON-serialisable."""
        held_out = find_files("validation_paths", validation_paths) if validation_paths else []
        everything = find_files("paths", paths)
        # A file that both name is held out.
        self._files = {"train": [p for p in everything if p not in held_out], "validation": held_out or everything}
        if not self._files["train"]:
            raise UserError("data.source.validation_paths: they hold out every file of data.source.paths")
        self._fraction = None if held_out else validation_fraction
        self._read_file = read_file
        files = {split: [file_identity(p) for p in files] for split, files in self._files.items()}
        content = json.dumps([files, self._fraction, settings], sort_keys=True)
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def shards(self, split: Split) -> Sequence[str]:
        return [] if split == "validation" and self._fraction == 0 else [path.name for path in self._files[split]]

    def read(self, split: Split, shard: int) -> Iterator[Document]:
        for document in self._read_file(self._files[split][shard]):
            if self._fraction is None or is_held_out(document.text, self._fraction) == (split == "validation"):
                yield document


def is_held_out(text: str, fraction: float) -> bool:
    """Whether the hash of a document falls among the lowest `fraction` of all hashes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * _HASH_RANGE


def check_fraction(fraction: float) -> None:
    """UserError unless a share of documents makes sense."""
    if not 0 <= fraction < 1:
        raise UserError(f"data.source.validation_fraction={fraction}: must be at least 0 and below 1")


def find_files(field: str, patterns: Sequence[str]) -> list[File]:
    """Files that the globs match, sorted, each once. UserError for a pattern that matches none."""
    if isinstance(patterns, str) or not patterns:
        raise UserError(f"data.source.{field}={patterns!r}: give a tuple of one or more files or globs")
    found: set[File] = set()
    for pattern in patterns:
        if "://" in pattern:
            files = _find_in_store(field, pattern)
        else:
            matches = map(pathlib.Path, glob.glob(str(pathlib.Path(pattern).expanduser()), recursive=True))
            files = {path.absolute() for path in matches if path.is_file()}
        if not files:
            raise UserError(f"data.source.{field}={pattern!r}: no such file (the pattern matches nothing)")
        found |= files
    return sorted(found, key=lambda path: (not isinstance(path, pathlib.Path), path))  # disks first, on every Python


def _find_in_store(field: str, url: str) -> set[File]:
    """Files of an object store that a glob matches."""
    scheme = url.partition("://")[0]
    said = f"data.source.{field}={url!r}"
    if scheme not in _STORES:
        raise UserError(f"{said}: files lie on disks or in {', '.join(f'{each}://' for each in _STORES)}")
    import fsspec
    from etils import epath

    try:
        store, pattern = fsspec.url_to_fs(url)
        matches = store.glob(pattern, detail=True)
    except ImportError as error:
        package = _STORES[scheme]
        raise UserError(f"{said}: needs {package}, which is not installed; run `pip install {package}`") from error
    except Exception as error:  # each store has its own for what it refuses
        raise UserError(f"{said}: {type(error).__name__}: {error}") from error
    files = [name for name, info in matches.items() if info["type"] == "file"]
    return {epath.Path(f"{scheme}://{name.removeprefix('/')}") for name in files}


def file_identity(path: File) -> list[Any]:
    """Changes when the file is replaced or written to."""
    if isinstance(path, pathlib.Path):
        stat = path.stat()
        return [str(path), stat.st_size, stat.st_mtime_ns]
    import fsspec

    store, name = fsspec.url_to_fs(str(path))
    return [str(path), store.checksum(name)]


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning the first time; corpora are read several times."""
    logging.getLogger(__name__).warning(message)
