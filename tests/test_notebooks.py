"""Notebooks run from top to bottom, and what is kept of them belongs to their sources."""

import importlib.util
import pathlib
import shutil

import jupytext
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(file for file in FOLDER.glob("*.py") if file.name != "render.py")


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_what_is_kept_is_of_the_source_and_small(source):
    kept = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    cells = [(cell.cell_type, cell.source) for cell in kept.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells], "run notebooks/render.py"
    assert all(cell.execution_count for cell in kept.cells if cell.cell_type == "code")
    pictures = [output.data["image/png"] for output in outputs(kept) if "image/png" in output.get("data", {})]
    assert pictures and all(len(picture) * 3 / 4 < 100_000 for picture in pictures)
    assert not [output for output in outputs(kept) if output.output_type == "error"]


def test_the_kernel_room(render):
    printed = "".join(output.get("text", "") for output in outputs(render.run(FOLDER / "kernel_room.py")))
    assert printed.count("True") == 7 and "False" not in printed  # every form gives NumPy's bits
    assert "share of a copy" in printed


def test_training_all_of_it(render, tmp_path, monkeypatch):
    for name in ("ast", "bisect", "calendar", "cmd", "csv", "glob", "heapq", "inspect", "shlex", "stat", "textwrap"):
        shutil.copy(pathlib.Path(shutil.__file__).with_name(f"{name}.py"), tmp_path)
    monkeypatch.setenv("NOTEBOOK_CORPUS", f"{tmp_path}/*.py")
    monkeypatch.setenv("NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # half the time to compile, for a few steps
    notebook = render.run(FOLDER / "train_tiny.py")
    printed = "".join(output.get("text", "") for output in outputs(notebook))
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 4
    assert "'config.json', " in printed and "largest difference of a logit: 0.0" in printed
