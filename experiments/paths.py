"""Paths in this machine's file system, as the user writes them."""

import os
import pathlib

from experiments.errors import UserError


def local_path(path: str | os.PathLike, name: str, instead: str = "name a directory") -> pathlib.Path:
    """UserError for a URL, of which pathlib would make a directory here; `name` is what the user calls it."""
    text = os.fspath(path)
    if "://" in text:
        raise UserError(f"{name}={text}: must lie in the file system of this machine; {instead}")
    return pathlib.Path(text)
