"""Corpora in plain text and JSONL files."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from experiments.data.documents import Document, FileSource, check_fraction, warn_once
from experiments.errors import UserError

if TYPE_CHECKING:
    from experiments.data.documents import File


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFilesConfig:
    """UTF-8 text files, one document each unless a separator cuts them."""

    paths: tuple[str, ...]  # files and globs (** goes into folders), of gs:// and s3:// too
    separator: str | None = None  # cut files into documents after each occurrence of this text
    validation_paths: tuple[str, ...] = ()  # files to hold out; without, documents are held out by hash
    validation_fraction: float = 0.05  # share of documents to hold out by hash
    skip_bad_files: bool = False  # leave out unreadable files instead of stopping

    def __post_init__(self):
        check_fraction(self.validation_fraction)
        if self.separator == "":
            raise UserError("data.source.separator='': give a text, or None for one document per file")

    def build(self) -> FileSource:
        """UserError if a pattern matches nothing."""
        read = functools.partial(_read_text, separator=self.separator, skip_bad=self.skip_bad_files)
        settings = [type(self).__name__, self.separator, self.skip_bad_files]
        return FileSource(self.paths, self.validation_paths, self.validation_fraction, settings, read)


def _read_text(path: File, *, separator: str | None, skip_bad: bool) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode()  # read_text would translate line ends
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        if separator is None:
            yield Document(str(path), text)
            return
        pieces = text.split(separator)
        for number, piece in enumerate(pieces):
            yield Document(f"{path}#{number}", piece if number == len(pieces) - 1 else piece + separator)
        return
    if not skip_bad:
        raise UserError(f"{path}: {reason}; convert it, or set data.source.skip_bad_files=True")
    warn_once(f"{path}: {reason}; left out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonlConfig:
    """Files with one JSON object a line."""

    paths: tuple[str, ...]  # files and globs, of gs:// and s3:// too
    text_field: str = "text"  # the field that holds a document
    validation_paths: tuple[str, ...] = ()  # files to hold out; without, documents are held out by hash
    validation_fraction: float = 0.05  # share of documents to hold out by hash
    skip_bad_lines: bool = False  # leave out corrupt lines instead of stopping

    def __post_init__(self):
        check_fraction(self.validation_fraction)

    def build(self) -> FileSource:
        """UserError if a pattern matches nothing."""
        read = functools.partial(_read_jsonl, field=self.text_field, skip_bad=self.skip_bad_lines)
        settings = [type(self).__name__, self.text_field, self.skip_bad_lines]
        return FileSource(self.paths, self.validation_paths, self.validation_fraction, settings, read)


def _read_jsonl(path: File, *, field: str, skip_bad: bool) -> Iterator[Document]:
    skipped = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    text = _text_of(json.loads(line.strip()), field)
                except ValueError as error:  # of json, and UnicodeDecodeError
                    if not skip_bad:
                        fix = "correct the line, or set data.source.skip_bad_lines=True"
                        raise UserError(f"{where}: {error}; {fix}") from error
                    if not skipped:
                        warn_once(f"{path}: corrupt lines are left out, the first is line {number}")
                    skipped += 1
                    continue
                yield Document(where, text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _text_of(record: object, field: str) -> str:
    if not isinstance(record, dict) or field not in record:
        raise ValueError(f"no field {field!r} (data.source.text_field)")
    if not isinstance(text := record[field], str):
        raise ValueError(f"field {field!r} holds {type(text).__name__}, not text")
    text.encode()  # ValueError for half a surrogate pair, which JSON can spell and UTF-8 cannot
    return text
