"""The safetensors reader against the library that defines the format, and against files that are wrong in one way each."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mdl.hf.safetensors import DTYPES, INDEX_NAME, open_tensors, read_header

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"


def write(file: pathlib.Path, header, data: bytes = b"", *, length: int | None = None) -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_wrote(tmp_path):
    rng = np.random.default_rng(0)
    want = {
        "half": rng.normal(size=(3, 5)).astype(np.float16),
        "brain": rng.normal(size=(2, 2, 2)).astype(ml_dtypes.bfloat16),
        "single": rng.normal(size=(4,)).astype(np.float32),
        "double": rng.normal(size=(1, 1)).astype(np.float64),
        "bytes": np.arange(7, dtype=np.uint8),
        "signed": np.arange(-3, 3, dtype=np.int8),
        "long": np.arange(3, dtype=np.int64),
        "flags": np.array([True, False]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(want, tmp_path / "model.safetensors", metadata={"format": "np"})
    tensors = open_tensors(tmp_path)
    assert set(tensors) == set(want)
    for name, value in want.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
        assert not tensors[name].flags.writeable


@pytest.mark.parametrize(
    ("code", "dtype"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("F8_E8M0", "float8_e8m0fnu")]
)
def test_reads_eight_bit_floats(tmp_path, code, dtype):
    data = bytes(range(1, 7))
    write(tmp_path / "model.safetensors", {"a": entry([2, 3], 0, 6, code)}, data)
    tensor = open_tensors(tmp_path)["a"]
    assert str(tensor.dtype) == dtype
    assert tensor.tobytes() == data


def test_reads_a_file_with_padded_header(tmp_path):
    file = write(tmp_path / "a.safetensors", json.dumps({"a": entry([1], 0, 4)}).encode() + b"   ", b"\0\0\x80\x3f")
    assert read_header(file)["a"].shape == (1,)


ONE = {"a": entry([2], 0, 8)}
BAD_HEADERS = {
    "not safetensors": (b"hello, world", b"", {"length": 10**15}, "header of 1000000000000000 bytes"),
    "no JSON": (b"{nonsense}", b"", {}, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", {}, "not valid JSON"),
    "deeply nested": (b"[" * 100_000, b"", {}, "not valid JSON"),
    "a list": (b"[]", b"", {}, "a JSON object is expected"),
    "a name twice": (b'{"a": 1, "a": 2}', b"", {}, "a appears twice"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"", {}, "tensor a needs dtype, shape and data_offsets"),
    "unknown dtype": ({"a": entry([2], 0, 8, "F33")}, bytes(8), {}, "tensor a has dtype F33"),
    "dtype is a list": ({"a": entry([2], 0, 8, ["F32"])}, bytes(8), {}, "tensor a has dtype"),
    "negative size": ({"a": entry([-2], 0, 8)}, bytes(8), {}, "tensor a has shape [-2]"),
    "fractional size": ({"a": entry([2.0], 0, 8)}, bytes(8), {}, "tensor a has shape [2.0]"),
    "boolean size": ({"a": entry([True], 0, 4)}, bytes(4), {}, "tensor a has shape [True]"),
    "huge size": ({"a": entry([2**70], 0, 8)}, bytes(8), {}, "tensor a has shape"),
    "huge but empty": ({"a": entry([0, 2**62, 4], 0, 0)}, b"", {}, "too large for any array"),
    "65 dims": ({"a": entry([1] * 65, 0, 4)}, bytes(4), {}, "too large for any array"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), b"", {}, "not valid JSON"),
    "a name of several lines": ({"a\nb" * 99: 1}, b"", {}, "tensor a ba b"),
    "a name that no text is": (b'{"\\ud800": 1}', b"", {}, "tensor \\ud800 needs dtype"),
    "backward offsets": ({"a": entry([2], 8, 0)}, bytes(8), {}, "tensor a has data_offsets [8, 0]"),
    "three offsets": ({"a": {**ONE["a"], "data_offsets": [0, 4, 8]}}, bytes(8), {}, "tensor a has data_offsets"),
    "size of another dtype": (
        {"a": entry([2], 0, 8, "F64")},
        bytes(8),
        {},
        "tensor a of shape [2] and dtype F64 takes 16",
    ),
    "truncated": (ONE, bytes(7), {}, "tensor a ends at byte"),
    "bytes left over": (ONE, bytes(9), {}, "1 bytes follow the last tensor"),
    "overlap": (ONE | {"b": entry([2], 4, 12)}, bytes(12), {}, "tensor b begins at data byte 4 where 8 is next"),
    "gap": (ONE | {"b": entry([2], 12, 20)}, bytes(20), {}, "tensor b begins at data byte 12 where 8 is next"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_file_is_one_clear_error(tmp_path, case):
    header, data, options, message = BAD_HEADERS[case]
    file = write(tmp_path / "model.safetensors", header, data, **options)
    with pytest.raises(ValueError) as error:
        open_tensors(tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(file)) + 300


def test_every_truncation_of_a_real_file_is_noticed(tmp_path):
    content = (GOLDEN / "llama" / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    for size in (0, 4, 8, 9, header_end // 2, header_end, header_end + 1, len(content) - 1):
        (tmp_path / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"truncated|not valid JSON"):
            open_tensors(tmp_path)


# ---- several files


def write_index(directory: pathlib.Path, weight_map) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def two_files(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "2.safetensors")
    return tmp_path


def test_reads_files_through_an_index(two_files):
    write_index(two_files, {"a": "1.safetensors", "b": "2.safetensors"})
    tensors = open_tensors(two_files)
    assert {name: tensors[name].tolist() for name in tensors} == {"a": [1, 1], "b": [0, 0, 0]}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "1.safetensors"} | {"b": "3.safetensors"}, "3.safetensors: is missing"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "1.safetensors: holds no tensor b"),
        ({"a": "../1.safetensors"}, "a .safetensors file beside the index is expected"),
        ({"a": "/etc/passwd"}, "a .safetensors file beside the index is expected"),
        ({"a": 1}, "a .safetensors file beside the index is expected"),
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
    ],
)
def test_a_bad_index_is_one_clear_error(two_files, weight_map, message):
    write_index(two_files, weight_map)
    with pytest.raises(ValueError, match=message):
        open_tensors(two_files)


def test_a_tensor_that_the_index_leaves_out_is_an_error(two_files):
    save_file({"a": np.ones(2, np.float32), "c": np.ones(2, np.float32)}, two_files / "1.safetensors")
    write_index(two_files, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(ValueError, match=r"1\.safetensors: holds tensor c, which .* does not expect there"):
        open_tensors(two_files)


def test_an_empty_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither"):
        open_tensors(tmp_path)


def test_dtype_table_is_complete():
    assert {"BF16", "F16", "F32", "F8_E4M3", "F8_E8M0", "I8", "U8"} <= DTYPES.keys()
