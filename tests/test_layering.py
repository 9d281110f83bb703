"""Imports go one way, nothing needs torch or tensorflow, and optional packages are imported only when they are used."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = ["kernels_pallas", "mdl", "experiments", "configs"]  # each may import itself and what stands before it
NEVER = {"torch", "tensorflow", "transformers", "clu", "ml_collections"}
ONLY_LAZILY = {"wandb", "matplotlib", "tensorboard", "safetensors", "tensorflow_datasets", "rich"}
FILES = [file.relative_to(ROOT) for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Top-level names of the packages that a module imports; `lazy` includes the imports inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, lazy=lazy)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_one_way(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    above = set(LAYERS[LAYERS.index(file.parts[0]) + 1 :]) | {"tests", "benchmarks"}
    assert not set(imports(tree, lazy=True)) & (above | NEVER)
    assert not set(imports(tree, lazy=False)) & ONLY_LAZILY


def test_the_check_sees_imports_inside_functions():
    tree = ast.parse("import a.b\nif x:\n    from c.d import e\ndef f():\n    import torch.nn\n")
    assert list(imports(tree, lazy=True)) == ["a", "c", "torch"]
    assert list(imports(tree, lazy=False)) == ["a", "c"]


def test_the_command_line_starts_without_jax():
    code = "import sys, experiments.cli; print(sorted({'jax', 'numpy', 'flax', 'optax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
