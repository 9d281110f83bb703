"""The safetensors writer against the library that defines the format, and what happens when a write goes wrong."""

import json
import multiprocessing
import os
import pathlib
import signal
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mdl.hf.safetensors import DTYPES, INDEX_NAME, open_tensors
from mdl.hf.safetensors_write import Shard, ShardWriter, plan_shards, write_index

F32, I8 = np.dtype(np.float32), np.dtype(np.int8)
AB = {"a": (F32, (3, 4)), "b": (F32, (5,))}


def values(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Every bit pattern may occur."""
    rng = np.random.default_rng(len(shape))
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype).reshape(shape)


EVERYTHING = {
    **{f"{code}.{i}": values(d, s) for code, d in DTYPES.items() for i, s in enumerate([(3, 5), (7,), (), (2, 0, 3)])},
    'ключ/键 "quoted" \n🗝': values(F32, (2, 2)),
}


def sizes_of(tensors):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write_all(directory: pathlib.Path, tensors, **options) -> list[Shard]:
    shards = plan_shards(sizes_of(tensors), **options)
    for shard in shards:
        with ShardWriter(directory, shard) as writer:
            for name in shard.entries:
                writer.write(name, tensors[name])
    write_index(directory, shards)
    return shards


def same_bytes(got, want) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name


def only_file_is(directory: pathlib.Path, *names: str) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)


# ---- what is written can be read


def test_our_reader_reads_every_dtype(tmp_path):
    write_all(tmp_path, EVERYTHING)
    same_bytes(open_tensors(tmp_path), EVERYTHING)
    only_file_is(tmp_path, "model.safetensors")


def test_the_library_reads_it(tmp_path):
    def library_has(tensor):  # its NumPy side knows no eight-bit floats
        return not str(tensor.dtype).startswith("float8")

    tensors = {name: tensor for name, tensor in EVERYTHING.items() if library_has(tensor)}
    write_all(tmp_path, tensors)
    same_bytes(load_file(tmp_path / "model.safetensors"), tensors)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_library_accepts_the_header_of_eight_bit_floats(tmp_path):
    write_all(tmp_path, EVERYTHING)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(EVERYTHING)
        for name, tensor in EVERYTHING.items():
            assert file.get_slice(name).get_dtype() == name.split(".")[0] or "ключ" in name
            assert tuple(file.get_slice(name).get_shape()) == tensor.shape


def test_everything_is_aligned(tmp_path):
    write_all(tmp_path, EVERYTHING)
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
    for name, entry in open_tensors(tmp_path).entries.items():
        assert entry.start % entry.dtype.itemsize == 0, name


def test_turned_and_sliced_arrays_arrive_as_they_are_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr("mdl.hf.safetensors_write._CHUNK_BYTES", 64)  # several chunks
    tensors = {
        "turned": values(F32, (6, 35)).T,
        "reversed": values(F32, (40,))[::-1],
        "every other": values(F32, (9, 8, 5))[:, ::2],
        "stretched": np.broadcast_to(values(F32, (4,)), (11, 4)),
    }
    write_all(tmp_path, tensors)
    same_bytes(open_tensors(tmp_path), tensors)


def test_rows_may_come_in_any_order(tmp_path):
    a_wide = values(F32, (10, 3))
    [shard] = plan_shards({"a": (F32, (10, 3))})
    with ShardWriter(tmp_path, shard) as writer:
        for rows in (slice(7, None), slice(0, 4), slice(4, 7)):
            writer.write("a", a_wide[rows], rows)
    same_bytes(open_tensors(tmp_path), {"a": a_wide})


def test_several_threads(tmp_path):
    tensors = {f"t{i}": values(F32, (64, 129)) for i in range(8)} | {"shared": values(F32, (80, 70))}
    [shard] = plan_shards(sizes_of(tensors))
    with ShardWriter(tmp_path, shard) as writer:

        def work(i):
            writer.write(f"t{i}", tensors[f"t{i}"])
            rows = slice(i * 10, (i + 1) * 10)
            writer.write("shared", tensors["shared"][rows], rows)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    same_bytes(open_tensors(tmp_path), tensors)


def test_a_mapped_tensor_is_not_copied_and_a_turned_one_only_in_parts(tmp_path):
    source = np.memmap(tmp_path / "source", np.float32, "w+", shape=(8192, 4096))  # 128 MB, sparse
    sizes = {"as it is": (F32, (8192, 4096)), "turned": (F32, (4096, 8192))}
    [shard] = plan_shards(sizes)
    with ShardWriter(tmp_path, shard) as writer:
        tracemalloc.start()
        writer.write("as it is", source)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        writer.write("turned", source.T)
        assert tracemalloc.get_traced_memory()[1] < 40e6
        tracemalloc.stop()


# ---- several files


def test_shards_keep_the_order_and_the_limit():
    sizes = {name: (I8, (length,)) for name, length in zip("abcdef", [40, 60, 1, 250, 30, 70], strict=True)}
    shards = plan_shards(sizes, max_shard_bytes=100)
    assert [list(shard.entries) for shard in shards] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e", "f"],
    ]  # d is larger than a file
    assert [shard.file for shard in shards] == [f"model-0000{i}-of-000004.safetensors" for i in (1, 2, 3, 4)]
    assert [shard.num_bytes for shard in shards] == [100, 1, 250, 100]


def test_index(tmp_path):
    shards = write_all(tmp_path, EVERYTHING, max_shard_bytes=300)
    assert len(shards) > 2
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in EVERYTHING.values())}
    assert index["weight_map"] == {name: shard.file for shard in shards for name in shard.entries}
    same_bytes(open_tensors(tmp_path), EVERYTHING)
    only_file_is(tmp_path, INDEX_NAME, *(shard.file for shard in shards))


@pytest.mark.parametrize(
    ("sizes", "limit", "message"),
    [
        ({}, 1, "no tensors"),
        (AB, 0, "max_shard_bytes is 0"),
        ({"a": (np.dtype(np.complex64), (1,))}, 1, "tensor a has dtype complex64"),
        ({"a": (np.dtype(">f4"), (1,))}, 1, "tensor a has dtype >f4"),
        ({"a": (np.dtype(ml_dtypes.int4), (1,))}, 1, "tensor a has dtype int4"),
        ({"__metadata__": (F32, (1,))}, 1, "cannot be called __metadata__"),
    ],
)
def test_what_cannot_be_planned(sizes, limit, message):
    with pytest.raises(ValueError, match=message):
        plan_shards(sizes, limit)


# ---- what goes wrong leaves nothing behind

A, B = values(F32, (3, 4)), values(F32, (5,))
WRONG = {
    "nothing came": ([], "2 tensors are missing or not whole (a, b)"),
    "one is missing": ([("a", A)], "1 tensors are missing or not whole (b)"),
    "rows are missing": ([("b", B), ("a", A[1:], slice(1, None))], "1 tensors are missing or not whole (a)"),
    "surplus": ([("c", A)], "tensor c does not belong in this file"),
    "twice": ([("a", A), ("a", A)], "tensor a is written twice"),
    "overlapping rows": ([("a", A[:2], slice(0, 2)), ("a", A[1:], slice(1, 3))], "tensor a is written twice"),
    "another shape": ([("a", A.T)], "tensor a is float32 [4, 3]; float32 [3, 4] is expected"),
    "another dtype": ([("a", A.view(np.int32))], "tensor a is int32 [3, 4]; float32 [3, 4] is expected"),
    "too few rows": ([("a", A[:1], slice(0, 2))], "tensor a is float32 [1, 4]; float32 [2, 4] is expected"),
    "rows beyond the end": ([("a", A[:2], slice(2, 4))], "tensor a is float32 [2, 4]; float32 [1, 4] is expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_clear_error_and_no_file(tmp_path, case):
    writes, message = WRONG[case]
    [shard] = plan_shards(AB)
    with pytest.raises(ValueError) as error, ShardWriter(tmp_path, shard) as writer:
        for write in writes:
            writer.write(*write)
    assert str(error.value) == f"{tmp_path / 'model.safetensors'}: {message}"
    only_file_is(tmp_path)


def test_an_interrupt_leaves_what_was_there(tmp_path):
    write_all(tmp_path, {"a": A})
    [shard] = plan_shards(AB)
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, shard) as writer:
        writer.write("a", A)
        raise KeyboardInterrupt
    same_bytes(open_tensors(tmp_path), {"a": A})
    only_file_is(tmp_path, "model.safetensors")


def _killed_in_the_middle(directory: pathlib.Path) -> None:
    [shard] = plan_shards(AB)
    with ShardWriter(directory, shard) as writer:
        writer.write("a", A)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_no_file_and_a_second_one_writes_it(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_killed_in_the_middle, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    only_file_is(tmp_path, "model.safetensors.partial")
    write_all(tmp_path, {"a": A, "b": B})
    same_bytes(open_tensors(tmp_path), {"a": A, "b": B})
    only_file_is(tmp_path, "model.safetensors")


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    [shard] = plan_shards(AB)
    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path, shard) as writer:
        monkeypatch.setattr(os, "pwrite", full)
        writer.write("a", A)
    only_file_is(tmp_path)


def test_a_directory_that_is_not_there(tmp_path):
    [shard] = plan_shards(AB)
    with pytest.raises(FileNotFoundError), ShardWriter(tmp_path / "absent", shard):
        pass
