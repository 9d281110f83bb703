"""Hugging Face directories to convert, commands that convert them, and what is compared."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np

from experiments.convert import main
from experiments.tokenizer import byte_tokenizer
from mdl.hf.safetensors import open_tensors

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FP8 = GOLDEN / "deepseek_v3_fp8"
BF16 = np.dtype(ml_dtypes.bfloat16)


def convert(source, to, **flags) -> pathlib.Path:
    """In this process; returns `to`."""
    assert main([f"--from={source}", f"--to={to}", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    assert not to.with_name(f"{to.name}.converting").exists()
    return to


def start(source, to, **flags) -> subprocess.Popen:
    """In a process of its own."""
    arguments = [f"--from={source}", f"--to={to}", *(f"--{name}={value}" for name, value in flags.items())]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.convert", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_same_tensors(a, b) -> None:
    """The same names, dtypes, shapes and bytes."""
    one, other = open_tensors(a), open_tensors(b)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


def assert_same_files(a, b) -> None:
    assert contents(a) == contents(b)


def contents(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def read_json(path) -> dict:
    return json.loads(path.read_text())


def as_bf16(source, to) -> pathlib.Path:
    """A copy whose parameters are bfloat16, written by hand: one file."""
    to.mkdir()
    tensors = {name: x if name.endswith("bias") else x.astype(BF16) for name, x in open_tensors(source).items()}
    write_safetensors(to / "model.safetensors", tensors)
    config = read_json(source / "config.json") | {"dtype": "bfloat16"}
    (to / "config.json").write_text(json.dumps(config))
    return to


def write_safetensors(file, tensors) -> None:
    """Straight from the format's description."""
    codes = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    header, end = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": codes[str(x.dtype)], "shape": x.shape, "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            stream.write(x.tobytes())


def with_companions(source, to) -> pathlib.Path:
    """A copy with a tokenizer, a chat template and a generation config."""
    shutil.copytree(source, to, copy_function=os.link)
    byte_tokenizer().save(to)
    (to / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}\n")
    (to / "generation_config.json").write_text('{"temperature": 0.6}')
    (to / "modeling.py").write_text("raise SystemExit('code of a checkpoint must not run')")
    return to
