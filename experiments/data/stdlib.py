"""Python's own standard library: real text that is on every machine and needs no download."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

from experiments.data.documents import Document, Split
from experiments.errors import UserError

# Tests and their data, tables, GUIs, and what is not part of the library.
_LEFT_OUT = {
    *("test", "tests", "idlelib", "lib2to3", "encodings", "tkinter", "turtledemo", "ensurepip"),
    *("site-packages", "dist-packages", "__pycache__"),
}
_TOPICS = "pydoc_data/topics.py"
_HELD_OUT_ONE_IN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibConfig:
    """The modules of the running Python's standard library, and the topics of its language reference as prose.

    It differs between Python versions: never compare losses across them.
    """

    def build(self) -> Stdlib:
        """Reads the library (9 MB); UserError if this Python has no source files."""
        return Stdlib(pathlib.Path(sysconfig.get_path("stdlib")))


class Stdlib:
    """One document per module and per topic of `pydoc_data.topics`; sha256(name) % 20 == 0 is held out."""

    def __init__(self, root: pathlib.Path):
        self._root = root
        self._documents = list(_read_library(root))
        if not self._documents:
            raise UserError(f"data.source: {root} holds no .py files; use TextFilesConfig with files of your own")
        digest = hashlib.sha256()
        for name, text in self._documents:
            digest.update(f"{name}\0{len(text)}\0{text}".encode())
        self.identity = digest.hexdigest()

    def shards(self, split: Split) -> Sequence[str]:
        del split
        return [self._root.name]

    def read(self, split: Split, shard: int) -> Iterator[Document]:
        del shard
        return (d for d in self._documents if _is_held_out(d.name) == (split == "validation"))

    def __reduce__(self):
        return Stdlib, (self._root,)  # workers read the library themselves


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT_ONE_IN == 0


def _read_library(root: pathlib.Path) -> Iterator[Document]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _LEFT_OUT)  # in place: os.walk enters only what is left, and in this order
        for name in sorted(files):
            if name.endswith(".py"):
                path = pathlib.Path(folder, name)
                yield from _read_module(path, path.relative_to(root).as_posix())


def _read_module(path: pathlib.Path, name: str) -> list[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {path} cannot be read as UTF-8 ({error})") from error
    if name != _TOPICS:
        return [Document(name, text)]
    # The module is one assignment of a dict of strings.
    tables = [ast.literal_eval(node.value) for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return [Document(f"{name}/{topic}", prose) for table in tables for topic, prose in sorted(table.items())]
