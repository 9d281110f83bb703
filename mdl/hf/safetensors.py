"""Reads safetensors files through memory maps: eight bytes of header length, a JSON header, then the bytes of the tensors.

Every header is checked in full before a tensor is touched, so that a damaged or truncated file is one ValueError that names the
file and the tensor. Nothing is copied until a caller does.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
METADATA_KEY = "__metadata__"  # of the header; all others name tensors
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 64  # NumPy's limit

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` counts bytes from the beginning of the file."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


def num_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """Tensors of a checkpoint by name, as read-only views of the mapped files; `entries` tells dtype and shape without a map."""

    def __init__(self, entries: Mapping[str, Entry]):
        self.entries = entries
        self._maps: dict[pathlib.Path, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(entry.file, np.uint8, mode="r").view(np.ndarray)
        content = self._maps[entry.file][entry.start : entry.start + entry.num_bytes]
        return content.view(entry.dtype).reshape(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_tensors(directory: str | os.PathLike) -> Tensors:
    """The tensors of a checkpoint directory: one `model.safetensors`, or the files that its index names.

    Raises FileNotFoundError if neither is there, ValueError naming file and tensor for what is wrong inside.
    """
    directory = pathlib.Path(directory)
    if (directory / INDEX_NAME).is_file():
        return Tensors(_indexed(directory / INDEX_NAME))
    if (directory / SINGLE_NAME).is_file():
        return Tensors(read_header(directory / SINGLE_NAME))
    raise FileNotFoundError(f"{directory}: holds neither {SINGLE_NAME} nor {INDEX_NAME}")


def read_header(file: str | os.PathLike) -> dict[str, Entry]:
    """Every tensor of one file, checked: known dtype, bytes that fit the shape, no gaps, no overlaps, nothing beyond the end."""
    file = pathlib.Path(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{file}: header of {length} bytes in a file of {size} bytes; not safetensors, or truncated"
            )
        header = _parse_json(file, stream.read(length))
    header.pop(METADATA_KEY, None)

    data_start = 8 + length
    entries: dict[str, Entry] = {}
    ends: list[tuple[int, int, str]] = []
    for name, fields in header.items():
        tensor = f"{file}: tensor {short(name)}"
        dtype, shape, (begin, end) = _check_fields(tensor, fields)
        entries[name] = Entry(file, dtype, shape, data_start + begin)
        if end - begin != entries[name].num_bytes:
            raise ValueError(
                f"{tensor} of shape {short(list(shape))} and dtype {fields['dtype']} takes {entries[name].num_bytes} bytes, "
                f"data_offsets give {end - begin}"
            )
        if end > size - data_start:
            raise ValueError(f"{tensor} ends at byte {data_start + end} of {size}; the file is truncated")
        ends.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(ends):
        if begin != expected:
            raise ValueError(
                f"{file}: tensor {short(name)} begins at data byte {begin} where {expected} is next: gap or overlap"
            )
        expected = end
    if expected != size - data_start:
        raise ValueError(f"{file}: {size - data_start - expected} bytes follow the last tensor")
    return entries


def _check_fields(tensor: str, fields: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise ValueError(f"{tensor} needs dtype, shape and data_offsets, got {short(fields)}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{tensor} has dtype {short(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise ValueError(f"{tensor} has shape {short(shape)}; a list of sizes is expected")
    # NumPy makes no such array, even where a 0 among the sizes leaves it empty.
    if len(shape) > _MAX_DIMS or num_bytes(DTYPES[dtype], tuple(max(size, 1) for size in shape)) >= 2**63:
        raise ValueError(f"{tensor} has shape {short(shape)}; that is too large for any array")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{tensor} has data_offsets {short(offsets)}; [begin, end] is expected")
    return DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _indexed(index: pathlib.Path) -> dict[str, Entry]:
    weight_map = _parse_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map from tensor names to files")
    directory = index.parent
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index}: tensor {short(name)} is said to be in {short(file)}; "
                "a .safetensors file beside the index is expected"
            )
    headers: dict[str, dict[str, Entry]] = {}
    present = {path.name for path in directory.iterdir() if path.is_file()}  # asks for no name that the index made up
    for file in sorted(set(weight_map.values())):
        if file not in present:
            name = next(name for name, where in weight_map.items() if where == file)
            raise ValueError(f"{directory / short(file)}: is missing; {INDEX_NAME} expects {short(name)} there")
        headers[file] = read_header(directory / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ValueError(f"{directory / file}: holds no tensor {short(name)}, which {INDEX_NAME} expects there")
    for file, entries in headers.items():
        for name in entries:
            if weight_map.get(name) != file:
                raise ValueError(
                    f"{directory / file}: holds tensor {short(name)}, which {INDEX_NAME} does not expect there"
                )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _parse_json(file: pathlib.Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{short(key)} appears twice")
            found[key] = value
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)  # of bytes it would guess the encoding
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{file}: not valid JSON ({short(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: a JSON object is expected, got {short(value)}")
    return value


def short(value: Any, length: int = 80) -> str:
    """What a file holds as a piece of one line that can be printed."""
    text = " ".join(str(value).split()).encode(errors="backslashreplace").decode()
    return text if len(text) <= length else f"{text[: length - 3]}..."
