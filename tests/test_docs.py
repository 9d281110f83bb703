"""docs/add_your_attention.md does what it says: its files and its edit in a copy of the packages, then its test and its config."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "add_your_attention.md").read_text(encoding="utf-8")
FILES = re.findall(r"^File `(.+?)`:\n\n```python\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)
EDITS = re.findall(r"^In `(.+?)`:\n\n```diff\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)
# so that it takes seconds: byte tokens of one folder, and a model of one layer
QUICK = (
    "--config.data.source=TextFilesConfig",
    "--config.data.tokenizer=ByteTokenizerConfig",
    "--config.model.vocab_size=320",
    "--config.model.hidden_size=32",
    "--config.model.num_hidden_layers=1",
    "--config.train.num_steps=2",
    "--config.train.seq_len=48",
    "--config.eval.sample_prompt=none",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The packages with the guide's files and edits."""
    folder = tmp_path_factory.mktemp("copy")
    for package in ("kernels_pallas", "mdl", "experiments", "configs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert not (folder / name).exists()
        (folder / name).write_text(text)
    for name, diff in EDITS:
        text = (folder / name).read_text()
        lines = diff.splitlines()
        added, replaced = [line[1:] for line in lines if line[0] == "+"], [line[1:] for line in lines if line[0] == "-"]
        *imports, last = added
        assert len(replaced) == 1 and text.count(replaced[0] + "\n") == 1
        text = text.replace(replaced[0], last)
        (folder / name).write_text(text.replace("\nfrom ", "\n" + "\n".join(imports) + "\nfrom ", 1))
    return folder


def run(copy, *arguments):
    environment = os.environ | {"PYTHONPATH": str(copy), "XDG_CACHE_HOME": str(copy / "cache")}
    command = [sys.executable, "-P", "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=240)


def test_the_guide_has_all_its_parts():
    assert [name for name, _ in FILES] == [
        "mdl/attention/window.py",
        "tests/mdl/test_window.py",
        "configs/tiny_window.py",
    ]
    assert [name for name, _ in EDITS] == ["mdl/block.py"]


def test_its_test_passes(copy):
    ended = run(copy, "pytest", "-q", "tests/mdl/test_window.py", "-p", "no:cacheprovider")
    assert ended.returncode == 0 and "3 passed" in ended.stdout, ended.stdout + ended.stderr


def test_its_config_trains_and_is_not_taken_for_another_model(copy):
    corpus = copy / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text(f"{number} " * 100)
    paths = f"--config.data.source.paths={corpus}/*.txt"
    arguments = [*QUICK, paths, "--config.data.source.validation_fraction=0", "--workdir=runs/window"]
    ended = run(copy, "experiments.run", "--config=configs/tiny_window.py:32", *arguments)
    assert ended.returncode == 0 and "sliding_window=32" in ended.stdout, ended.stdout + ended.stderr
    ended = run(copy, "experiments.convert", "--from=runs/window", "--to=hf")
    assert ended.returncode == 2 and "attention is WindowConfig" in ended.stderr, ended.stdout + ended.stderr


def test_its_config_is_checked(copy):
    flags = "--config.model.attention=WindowConfig", "--config.model.attention.sliding_window=1", "--workdir=never"
    ended = run(copy, "experiments.run", "--config=configs/tiny.py", *flags)
    assert ended.returncode == 2 and "sliding_window is 1" in ended.stderr, ended.stderr
