"""300 damaged safetensors headers and indexes: each loads what it says or is one clear error, quickly and in little memory."""

import json
import pathlib
import random
import shutil
import time
import tracemalloc
from collections import Counter

import ml_dtypes
import numpy as np

from mdl.hf.safetensors import INDEX_NAME, SINGLE_NAME, open_tensors
from mdl.hf.safetensors_write import ShardWriter, plan_shards, write_index

HEADERS, INDEXES = 200, 100
SECONDS = 10  # far above what any takes, far below a hang
BYTES = 4_000_000  # the files have a few thousand; a header that promises 2^60 must not be believed

# The sizes of the format's dtypes, apart from the reader's own table.
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
ITEM_BYTES |= {"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}

ODD_VALUES = [
    *(0, 1, -1, 7, 2**31, 2**60, 2**63, 2**64, 10**400, 1.0, 1e999, float("nan"), True, None, "", "F32", "é\ud800\n", [], {}),
    *([0, 0], [0, 2**60], [2**62, 2**62], [0, 2**62, 2**62], [1] * 100, [-4, 4], [[2]], {"a": 1}, "9" * 1000),
]  # fmt: skip


def originals() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "layers.0.weight": rng.normal(size=(4, 6)).astype(np.float32),
        "layers.0.scale": rng.integers(0, 256, (3,), np.uint8).view(ml_dtypes.float8_e8m0fnu),
        "layers.1.weight": rng.normal(size=(5, 3)).astype(ml_dtypes.bfloat16),
        "layers.1.fp8": rng.integers(0, 256, (7, 5), np.uint8).view(ml_dtypes.float8_e4m3fn),
        "scalar": np.array(3.5, np.float64),
        "empty": np.zeros((0, 3), np.float16),
    }


def write(directory: pathlib.Path, *, max_shard_bytes: int) -> None:
    tensors = originals()
    shards = plan_shards({name: (t.dtype, t.shape) for name, t in tensors.items()}, max_shard_bytes)
    for shard in shards:
        with ShardWriter(directory, shard) as writer:
            for name in shard.entries:
                writer.write(name, tensors[name])
    write_index(directory, shards)


# ---- damage


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, taken out, put in or doubled."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, length = rng.randrange(len(content)), rng.choice([1, 1, 2, 9, 40])
        middle = content[at : at + length]
        new = rng.choice(
            [
                bytes([middle[0] ^ 1 << rng.randrange(8)]) + middle[1:],
                b"",
                rng.randbytes(length),
                middle * 2,
                middle + b'"}',
            ]
        )
        content = content[:at] + new + content[at + length :]
        content = content or b"\0"
    return content


def damage_json(value, rng: random.Random):
    """One node, at any depth, replaced, removed, renamed, doubled under another name, or moved by a little."""
    nodes = []

    def collect(parent):
        for key in parent if isinstance(parent, dict) else range(len(parent)):
            nodes.append((parent, key))
            if isinstance(parent[key], dict | list):
                collect(parent[key])

    collect(value)
    parent, key = rng.choice(nodes)
    kind = rng.randrange(6)
    if kind == 0 or not isinstance(parent, dict | list):
        parent[key] = rng.choice(ODD_VALUES)
    elif kind == 1:
        del parent[key]
    elif kind == 2 and isinstance(parent, dict):
        parent[rng.choice(["", "dtype", "renamed", "\n" * 300, "\ud800", "__metadata__"])] = parent.pop(key)
    elif kind == 3 and isinstance(parent, dict):
        parent[f"{key} again"] = parent[key]
    elif isinstance(parent[key], int):
        parent[key] += rng.choice([-8, -4, -1, 1, 4, 8])
    elif isinstance(parent[key], list):
        rng.shuffle(parent[key])
    else:
        parent[key] = rng.choice([*ITEM_BYTES, *ODD_VALUES])
    return value


def damage_file(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return content + rng.randbytes(rng.choice([1, 8, 1000]))
    if kind == 2:
        wrong = rng.choice([0, 1, length - 1, length + 1, length + 8, len(content), 2**31, 2**60, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + header + data
    if kind == 3:
        header = damage_bytes(header, rng)
    elif kind == 4:
        header = header.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))
    else:
        header = json.dumps(damage_json(json.loads(header), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data


# ---- what must come of it


def opened(directory: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Every tensor, read in full; None after an error of ours. Anything else is a failure, and so are time and memory."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        tensors = open_tensors(directory)
        return {name: tensors[name].copy() for name in tensors}
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert message.startswith(str(directory)) and "\n" not in message, message
        assert len(message) < 2 * len(str(directory)) + 500, message
        message.encode()  # it can be printed
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.monotonic() - start < SECONDS
        assert peak < BYTES


def check_against_header(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Read once more, by hand: the bytes at the offsets, of the dtype and shape that the header names."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length].decode("utf-8")), content[8 + length :]
    header.pop("__metadata__", None)
    assert set(tensors) == set(header)
    covered = Counter()
    for name, fields in header.items():
        begin, end = fields["data_offsets"]
        assert 0 <= begin <= end <= len(data)
        assert tensors[name].shape == tuple(fields["shape"])
        assert tensors[name].dtype.itemsize == ITEM_BYTES[fields["dtype"]]
        assert tensors[name].tobytes() == data[begin:end]
        covered.update(range(begin, end))
    assert covered == Counter(range(len(data)))  # every byte once


# Few of them load; if none did, or all, the tests would say nothing.


def test_damaged_headers(tmp_path):
    write(tmp_path, max_shard_bytes=10**9)
    whole = (tmp_path / SINGLE_NAME).read_bytes()
    loaded = 0
    for seed in range(HEADERS):
        directory = tmp_path / str(seed)
        directory.mkdir()
        (directory / SINGLE_NAME).write_bytes(damage_file(whole, random.Random(seed)))
        tensors = opened(directory)
        if tensors is not None:
            check_against_header(directory / SINGLE_NAME, tensors)
            loaded += 1
    assert 0.03 < loaded / HEADERS < 0.5


def damage_checkpoint(directory: pathlib.Path, rng: random.Random) -> None:
    file = directory / INDEX_NAME
    index = json.loads(file.read_text())
    kind = rng.randrange(4)
    if kind == 0:
        file.write_bytes(damage_bytes(file.read_bytes(), rng))
    elif kind == 1:
        names = [*index["weight_map"].values(), "unrelated.safetensors", "folder.safetensors", "../model.safetensors"]
        names += ["", ".", "/etc/passwd", "x" * 5000 + ".safetensors", "\0.safetensors", "\ud800.safetensors"]
        index["weight_map"][rng.choice(list(index["weight_map"]))] = rng.choice(names)
        file.write_text(json.dumps(index))
    elif kind == 2:
        file.write_text(json.dumps(damage_json(index, rng)))
    else:
        shard = directory / rng.choice(sorted(set(index["weight_map"].values())))
        shard.write_bytes(damage_file(shard.read_bytes(), rng))


def test_damaged_indexes(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole, max_shard_bytes=100)
    (whole / "unrelated.safetensors").write_bytes(b"\xff" * 50)
    (whole / "folder.safetensors").mkdir()
    loaded = 0
    for seed in range(INDEXES):
        directory = tmp_path / str(seed)
        shutil.copytree(whole, directory)
        damage_checkpoint(directory, random.Random(seed))
        tensors = opened(directory)
        if tensors is not None:
            weight_map = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
            assert set(tensors) == set(weight_map)
            for file in set(weight_map.values()):
                check_against_header(directory / file, {n: t for n, t in tensors.items() if weight_map[n] == file})
            loaded += 1
    assert 0.03 < loaded / INDEXES < 0.5


def test_the_originals_load(tmp_path):
    write(tmp_path, max_shard_bytes=100)
    tensors = opened(tmp_path)
    assert tensors is not None
    for name, tensor in originals().items():
        assert (tensors[name].dtype, tensors[name].tobytes()) == (tensor.dtype, tensor.tobytes())
