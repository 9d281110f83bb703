"""Corpora in Parquet and ArrayRecord files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from experiments.data.documents import Document, FileSource, check_fraction
from experiments.errors import UserError

if TYPE_CHECKING:
    from experiments.data.documents import File

_BATCH = 256  # records read at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetConfig:
    """Parquet files, one document a row."""

    paths: tuple[str, ...]  # files and globs, of gs:// and s3:// too
    column: str = "text"  # the column that holds the documents
    validation_paths: tuple[str, ...] = ()  # files to hold out; without, documents are held out by hash
    validation_fraction: float = 0.05  # share of documents to hold out by hash

    def __post_init__(self):
        check_fraction(self.validation_fraction)

    def build(self) -> FileSource:
        """UserError if a pattern matches nothing."""
        read = functools.partial(_read_parquet, column=self.column)
        settings = [type(self).__name__, self.column]
        return FileSource(self.paths, self.validation_paths, self.validation_fraction, settings, read)


def _read_parquet(path: File, *, column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: no column {column!r}; set data.source.column to one of {names}")
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise UserError(
                            f"{path}: row {number} of column {column!r} holds {type(text).__name__}, not text"
                        )
                    yield Document(f"{path}#{number}", text)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordConfig:
    """ArrayRecord files whose records are UTF-8 text, one document each."""

    paths: tuple[str, ...]  # files and globs
    validation_paths: tuple[str, ...] = ()  # files to hold out; without, documents are held out by hash
    validation_fraction: float = 0.05  # share of documents to hold out by hash

    def __post_init__(self):
        check_fraction(self.validation_fraction)
        for path in (*self.paths, *self.validation_paths):
            if "://" in path:
                raise UserError(
                    f"data.source.paths={path!r}: ArrayRecord files are read from disks; copy or mount them"
                )

    def build(self) -> FileSource:
        """UserError if a pattern matches nothing."""
        settings = [type(self).__name__]
        return FileSource(
            self.paths, self.validation_paths, self.validation_fraction, settings, _read_array_record_texts
        )


def _read_array_record_texts(path: File) -> Iterator[Document]:
    for number, record in enumerate(read_array_record(path)):
        try:
            yield Document(f"{path}#{number}", record.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: record {number} is not UTF-8 text (byte {error.start})") from error


def read_array_record(path: File, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Records start to stop of a file in order, whatever its group size; UserError if it cannot be read."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        if not reader.ok():
            reader.close()  # raises what is wrong
        stop = reader.num_records() if stop is None else stop
        for first in range(start, stop, _BATCH):
            yield from reader.read(first, min(first + _BATCH, stop))
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise UserError(f"{path}: not a readable ArrayRecord file ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; some libraries write a page."""
    return str(error).strip().split("\n")[0]
