"""Every field of every config is read somewhere: a switch that does nothing is worse than none."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ["mdl", "experiments"]
READERS = ["kernels_pallas", "mdl", "experiments"]


def config_fields(tree: ast.AST) -> list[tuple[str, str]]:
    """(class, field) of every dataclass in the tree whose name ends in `Config`."""
    found = []
    for node in ast.walk(tree):
        decorators = " ".join(map(ast.unparse, node.decorator_list)) if isinstance(node, ast.ClassDef) else ""
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and "dataclass" in decorators:
            fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            found += [(node.name, target.id) for target in fields if isinstance(target, ast.Name)]
    return found


def attributes_read(module: ast.AST) -> set[str]:
    """Names read as `something.name`, outside `__post_init__`: a check of a value is not a use of it.

    Where a module reads `getattr(self, name)`, every string in that module counts.
    """
    nodes = list(walk_without_checks(module))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    if any(isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" for node in nodes):
        names |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return names


def walk_without_checks(node: ast.AST) -> Iterator[ast.AST]:
    if not (isinstance(node, ast.FunctionDef) and node.name == "__post_init__"):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk_without_checks(child)


def trees(packages: list[str]) -> dict[pathlib.Path, ast.AST]:
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    return {file.relative_to(ROOT): ast.parse(file.read_text(encoding="utf-8")) for file in files}


FIELDS = [(str(file), *field) for file, tree in trees(CONFIGS).items() for field in config_fields(tree)]


@pytest.fixture(scope="module")
def read_anywhere():
    return set().union(*map(attributes_read, trees(READERS).values()))


@pytest.mark.parametrize(("file", "cls", "field"), FIELDS)
def test_field_is_read(read_anywhere, file, cls, field):
    assert field in read_anywhere, f"{file}: nothing reads {cls}.{field}; use it or delete it"


def test_the_check_finds_a_dead_field():
    source = """
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeadConfig:
    alive: int = 1
    dead: int = 2

    def __post_init__(self):
        assert self.dead > 0

    def build(self):
        return self.alive
"""
    tree = ast.parse(source)
    fields = config_fields(tree)
    assert fields == [("DeadConfig", "alive"), ("DeadConfig", "dead")]
    assert [field for _, field in fields if field not in attributes_read(tree)] == ["dead"]
