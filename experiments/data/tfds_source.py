"""Corpora that TensorFlow Datasets has prepared, read without TensorFlow and never downloaded."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.data.documents import Document, Split, check_fraction, file_identity, is_held_out
from experiments.data.records import first_line, read_array_record
from experiments.errors import UserError

_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsConfig:
    """A prepared TFDS dataset in ArrayRecord or TFRecord files."""

    name: str  # as in lm1b, wikipedia/20230601.en or my_dataset/1.0.0
    data_dir: str = "~/tensorflow_datasets"  # where datasets are prepared
    split: str = "train"  # a split or slice, as in train[:10%]
    validation_split: str | None = None  # as in test; None holds out documents of `split` by hash
    text_feature: str = "text"  # the feature that holds a document
    validation_fraction: float = 0.05  # share of documents to hold out by hash

    def __post_init__(self):
        check_fraction(self.validation_fraction)

    def build(self) -> TfdsSource:
        """Reads metadata only. UserError, at once, if nothing is prepared there or the split or feature is missing."""
        return TfdsSource(self)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Consecutive records of one file."""

    path: pathlib.Path
    start: int
    stop: int


class TfdsSource:
    """See TfdsConfig. A shard is a file of the split."""

    def __init__(self, config: TfdsConfig):
        self._config = config
        self._directory = _find_prepared(config)
        split = config.validation_split or config.split
        self._parts = {"train": self._parts_of(config.split), "validation": self._parts_of(split)}
        if config.text_feature not in (features := self._builder.info.features or {}):
            known = ", ".join(features)
            raise UserError(
                f"data.source.text_feature={config.text_feature!r}: {config.name} has no such feature, only {known}"
            )
        content = [
            (self._directory / "dataset_info.json").read_text(),
            {s: [[*file_identity(p.path), p.start, p.stop] for p in parts] for s, parts in self._parts.items()},
            [config.text_feature, config.validation_split, config.validation_fraction],
        ]
        self.identity = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            return tfds.builder_from_directory(str(self._directory))
        except Exception as error:  # of many kinds, from JSON, protobuf and TFDS itself
            raise UserError(f"{self._directory}: not a readable TFDS dataset ({first_line(error)})") from error

    def _parts_of(self, split: str) -> list[_Part]:
        try:
            instructions = self._builder.info.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            known = ", ".join(self._builder.info.splits)
            raise UserError(f"data.source.split={split!r}: {self._config.name} has only the splits {known}") from error
        parts = [_Part(pathlib.Path(i.filename), i.skip, i.skip + i.take) for i in instructions]
        for part in parts:
            if not part.path.is_file():
                raise UserError(f"{part.path}: a file of {self._config.name} is missing; prepare the dataset again")
        return parts

    def shards(self, split: Split) -> Sequence[str]:
        no_held_out = self._config.validation_split is None and self._config.validation_fraction == 0
        return [] if split == "validation" and no_held_out else [part.path.name for part in self._parts[split]]

    def read(self, split: Split, shard: int) -> Iterator[Document]:
        part = self._parts[split][shard]
        fraction = None if self._config.validation_split else self._config.validation_fraction
        features, wanted = self._builder.info.features, self._config.text_feature
        for number, record in enumerate(self._records(part), start=part.start):
            where = f"{part.path}#{number}"
            value = features.deserialize_example_np(record)[wanted]
            text = _as_text(value, where, wanted)
            if fraction is None or is_held_out(text, fraction) == (split == "validation"):
                yield Document(where, text)

    def _records(self, part: _Part) -> Iterator[bytes]:
        file_format = self._builder.info.file_format.value
        if file_format == "array_record":
            return read_array_record(part.path, part.start, part.stop)
        if file_format == "tfrecord":
            return _read_tfrecord(part)
        fix = "prepare it with --file_format=array_record"
        raise UserError(f"{self._directory}: {file_format} files cannot be read without TensorFlow; {fix}")

    def __reduce__(self):
        return TfdsSource, (self._config,)  # workers open the dataset themselves


def _find_prepared(config: TfdsConfig) -> pathlib.Path:
    data_dir = pathlib.Path(config.data_dir).expanduser()
    directory = data_dir / config.name
    if (directory / "dataset_info.json").is_file():
        return directory
    children = [child for child in directory.glob("*") if child.is_dir()]
    versions = [c for c in children if _VERSION.fullmatch(c.name) and (c / "dataset_info.json").is_file()]
    if versions:
        return max(versions, key=lambda version: [int(part) for part in version.name.split(".")])
    if configs := sorted(f"{config.name}/{c.name}" for c in children if list(c.glob("*/dataset_info.json"))):
        raise UserError(f"data.source.name={config.name}: give one of its configs: {', '.join(configs)}")
    raise UserError(
        f"data.source.name={config.name}: not prepared in {data_dir}; nothing is downloaded here. Where TensorFlow is "
        f"installed run: tfds build {config.name} --file_format=array_record --data_dir={config.data_dir}"
    )


def _read_tfrecord(part: _Part) -> Iterator[bytes]:
    """A record is a length (uint64), its checksum (uint32), the bytes and theirs; checksums are not compared."""
    with open(part.path, "rb") as file:
        for number in range(part.stop):
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            if number < part.start and len(header) == 12:
                file.seek(length + 4, 1)
                continue
            record = file.read(length + 4)
            if len(header) < 12 or len(record) < length + 4:
                raise UserError(f"{part.path}: ends inside record {number}; copy or prepare the file again")
            yield record[:-4]


def _as_text(value: Any, where: str, feature: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: feature {feature!r} is not UTF-8 text (byte {error.start})") from error
