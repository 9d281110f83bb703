"""Writes safetensors files at planned offsets, so that threads can put tensors, or rows of them, in any order.

A file appears under its name only when it is whole: until then it is `<name>.partial`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mdl.hf.safetensors import DTYPES, INDEX_NAME, MAX_HEADER_BYTES, METADATA_KEY, SINGLE_NAME, num_bytes

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK_BYTES = 1 << 24  # of a turned tensor that is made contiguous at a time; also far below what one pwrite takes

Sizes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape of every tensor


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write: its name, and its tensors in the order in which their bytes lie in it."""

    file: str
    entries: Sizes

    @property
    def num_bytes(self) -> int:
        """Of the tensors, without the header."""
        return sum(num_bytes(*size) for size in self.entries.values())


def plan_shards(sizes: Sizes, max_shard_bytes: int = 5_000_000_000) -> list[Shard]:
    """Splits tensors in their order over files of at most `max_shard_bytes`; a larger tensor gets a file of its own.

    Raises ValueError for tensors that the format has no word for.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    if not sizes:
        raise ValueError("there are no tensors to write")
    parts: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in sizes.items():
        if np.dtype(dtype) not in _CODES:
            raise ValueError(f"tensor {name} has dtype {dtype}; safetensors files hold {', '.join(map(str, _CODES))}")
        if name == METADATA_KEY:
            raise ValueError(f"a tensor cannot be called {METADATA_KEY}: the format uses the name itself")
        size = num_bytes(dtype, shape)
        if parts[-1] and filled + size > max_shard_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = (np.dtype(dtype), tuple(shape))
        filled += size
    files = [SINGLE_NAME]
    if len(parts) > 1:
        files = [f"model-{i:05d}-of-{len(parts):06d}.safetensors" for i in range(1, len(parts) + 1)]
    return [Shard(file, _aligned(part)) for file, part in zip(files, parts, strict=True)]


def _aligned(entries: Sizes) -> Sizes:
    """Wide items first: no gaps are allowed, and so every tensor begins at a multiple of its item size."""
    return dict(sorted(entries.items(), key=lambda entry: -entry[1][0].itemsize))


class ShardWriter:
    """Context manager that writes one file; `write` may be called from several threads.

    Leaving the block checks that every tensor came, syncs to disk and renames. ValueError if one is missing; after that or any
    other exception nothing is left behind.
    """

    def __init__(self, directory: str | os.PathLike, shard: Shard):
        self.file = pathlib.Path(directory) / shard.file
        self.shard = shard
        self._partial = self.file.with_name(f"{self.file.name}.partial")
        self._header, self._starts = _header(shard)
        self._descriptor = -1
        self._lock = threading.Lock()
        self._begun: defaultdict[str, list[range]] = defaultdict(list)
        self._written: Counter[str] = Counter()

    def __enter__(self) -> "ShardWriter":
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        with self._removed_on_error():
            os.truncate(self._descriptor, len(self._header) + self.shard.num_bytes)
            _write_at(self._descriptor, memoryview(self._header), 0)
        return self

    def write(self, name: str, array: np.ndarray, rows: slice | None = None) -> None:
        """Puts a tensor, or those of its leading rows, at its place. ValueError if dtype or shape differ, or it came before."""
        if name not in self.shard.entries:
            raise ValueError(f"{self.file}: tensor {name} does not belong in this file")
        dtype, shape = self.shard.entries[name]
        begin, end, step = (slice(None) if rows is None else rows).indices(shape[0] if shape else 1)
        part = (max(end - begin, 0), *shape[1:]) if shape else ()
        if array.dtype != dtype or array.shape != part or step != 1:
            raise ValueError(
                f"{self.file}: tensor {name} is {array.dtype} {list(array.shape)}; {dtype} {list(part)} is expected"
            )
        with self._lock:
            if any(max(begin, other.start) < min(end, other.stop) for other in self._begun[name]):
                raise ValueError(f"{self.file}: tensor {name} is written twice")
            self._begun[name].append(range(begin, end))
        start = self._starts[name] + begin * num_bytes(dtype, shape[1:])
        for chunk in _chunks(array):
            _write_at(self._descriptor, chunk, start)
            start += len(chunk)
        with self._lock:
            self._written[name] += array.nbytes

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        with self._removed_on_error():
            if kind is not None:
                self._partial.unlink()
            else:
                self._check_complete()
                os.fsync(self._descriptor)
                self._partial.rename(self.file)
        os.close(self._descriptor)
        sync_directory(self.file.parent)

    def _check_complete(self) -> None:
        missing = [name for name, size in self.shard.entries.items() if self._written[name] != num_bytes(*size)]
        if missing:
            some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            raise ValueError(f"{self.file}: {len(missing)} tensors are missing or not whole ({some})")

    @contextlib.contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            os.close(self._descriptor)
            self._partial.unlink(missing_ok=True)
            raise


def write_index(directory: str | os.PathLike, shards: Sequence[Shard]) -> None:
    """Writes model.safetensors.index.json beside the files of several shards; a single file needs none."""
    if len(shards) == 1:
        return
    weight_map = {name: shard.file for shard in shards for name in shard.entries}
    total = sum(shard.num_bytes for shard in shards)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    file = pathlib.Path(directory) / INDEX_NAME
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
    sync_directory(file.parent)


def _header(shard: Shard) -> tuple[bytes, dict[str, int]]:
    """The first bytes of the file, a multiple of 8, and where each tensor starts, counted from the beginning of the file."""
    fields: dict[str, object] = {METADATA_KEY: {"format": "pt"}}  # some readers want to be told, any value will do
    offsets: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in shard.entries.items():
        offsets[name] = end
        end += num_bytes(dtype, shape)
        fields[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{shard.file}: {len(offsets)} tensors need a header of {len(text)} bytes; use smaller shards")
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def _chunks(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order, without a copy of what lies in that order already."""
    rows = array if array.ndim else array[None]
    step = max(1, _CHUNK_BYTES * len(rows) // max(array.nbytes, 1))
    for begin in range(0, len(rows), step):
        # The buffer protocol does not know the eight-bit floats, but their bytes.
        yield np.ascontiguousarray(rows[begin : begin + step]).reshape(-1).view(np.uint8).data


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def sync_directory(directory: str | os.PathLike) -> None:
    """Makes the names in a directory last."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
