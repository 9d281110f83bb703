"""Where conversion reads from: rows of named tensors, in the layout of Hugging Face files, from either format."""

import dataclasses
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from experiments.arrays_on_disk import ArraysOnDisk
from experiments.conversion.arrays import Size, num_bytes, sum_of_words
from experiments.conversion.layouts import row_step, rows_of_ours, to_theirs
from mdl.hf.safetensors import Entry, open_tensors
from mdl.hf.table import Layout

_SUM_BYTES = 8 << 20  # summed at a time


class Source(Protocol):
    """Tensors by name, in order. `read` may be called from several threads."""

    @property
    def sizes(self) -> Mapping[str, Size]: ...

    def row_step(self, name: str) -> int:
        """Rows are read in multiples of so many."""
        ...

    def read(self, name: str, rows: range) -> np.ndarray: ...

    def fingerprint(self) -> Any:
        """JSON that changes when somebody writes to the files."""
        ...


class HfSource:
    """The safetensors files of a directory. Reads by `pread`: pages of a map would count as this process's memory."""

    def __init__(self, directory: pathlib.Path):
        self._entries: Mapping[str, Entry] = open_tensors(directory).entries
        in_place = sorted(self._entries.items(), key=lambda item: (item[1].file, item[1].start))
        self.sizes: Mapping[str, Size] = {name: (entry.dtype, entry.shape) for name, entry in in_place}
        self._files: dict[pathlib.Path, int] = {}
        self._lock = threading.Lock()

    def row_step(self, name: str) -> int:
        return 1

    def read(self, name: str, rows: range) -> np.ndarray:
        """Rows of a tensor; OSError if the file has shrunk."""
        entry = self._entries[name]
        row = (entry.dtype, entry.shape[1:])
        content = np.empty(len(rows) * num_bytes(row), np.uint8)
        descriptor, start = self._open(entry.file), entry.start + rows.start * num_bytes(row)
        read_exactly(descriptor, content, start, entry.file)
        leave_page_cache(descriptor, start, content.size)
        return content.view(entry.dtype).reshape(len(rows), *entry.shape[1:])

    def fingerprint(self) -> list[list[Any]]:
        return stamps(sorted({entry.file for entry in self._entries.values()}))

    def _open(self, file: pathlib.Path) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            return self._files[file]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies in a checkpoint of ours: an index of the leading dims of an array, and how the rest is turned."""

    array: str
    index: tuple[int, ...]
    layout: Layout


class RunSource:
    """The arrays of one step of a run, whoever wrote it, as the tensors that `places` names."""

    def __init__(self, state: pathlib.Path, arrays: Mapping[str, Size], places: Mapping[str, Place]):
        self._state, self._arrays, self._places = state, arrays, places
        self._on_disk = ArraysOnDisk(state)
        self._stores: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.sizes: Mapping[str, Size] = {name: self._size(place) for name, place in places.items()}

    def _size(self, place: Place) -> Size:
        dtype, _ = self._arrays[place.array]
        return dtype, place.layout.shape_on_disk(self._inner_shape(place))

    def _inner_shape(self, place: Place) -> tuple[int, ...]:
        return self._arrays[place.array][1][len(place.index) :]

    def row_step(self, name: str) -> int:
        """Of merged dims only the first can be cut."""
        place = self._places[name]
        return row_step(place.layout, self._inner_shape(place))

    def read(self, name: str, rows: range) -> np.ndarray:
        place = self._places[name]
        index = rows_of_ours(place.layout, self._inner_shape(place), rows)
        ours = self._open(place.array)[(*place.index, *index)].read().result()
        return to_theirs(ours, place.layout)

    def fingerprint(self) -> list[list[Any]]:
        return stamps(sorted(path for path in self._state.parent.rglob("*") if path.is_file()))

    def _open(self, array: str) -> Any:
        with self._lock:
            if array not in self._stores:
                self._stores[array] = self._on_disk.open(array)
            return self._stores[array]


def read_exactly(descriptor: int, content: np.ndarray, offset: int, file: pathlib.Path) -> None:
    """Fills `content`, bytes, from a place in a file."""
    view = content.data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise OSError(f"{file}: ends at byte {offset}, earlier than its header says")
        view, offset = view[count:], offset + count


def sum_on_disk(descriptor: int, size: Size, start: int, file: pathlib.Path) -> int:
    """`sum_of_words` of an array at a place in a file, a few megabytes at a time."""
    length, total = num_bytes(size), 0
    for begin in range(0, length, _SUM_BYTES):
        part = np.empty(min(_SUM_BYTES, length - begin), np.uint8)
        read_exactly(descriptor, part, start + begin, file)
        total += sum_of_words(part.view(size[0]))
    return total % 2**32


def leave_page_cache(descriptor: int, start: int, length: int) -> None:
    """Makes room for what is converted next: nobody reads this part of the file again, and it is on the disk."""
    if length and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def stamps(files: list[pathlib.Path]) -> list[list[Any]]:
    """Name, size and time of last change of files: equal as long as nobody has written to them."""
    return [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]
