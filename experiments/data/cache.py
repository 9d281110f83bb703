"""Directories that are built once and then shared: the token cache and trained tokenizers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import TypeVar

from experiments.errors import UserError

T = TypeVar("T")


def default_cache_dir() -> pathlib.Path:
    """`$XDG_CACHE_HOME/mdl` or `~/.cache/mdl`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(root) if root else pathlib.Path.home() / ".cache") / "mdl"


class DamagedError(Exception):
    """A cached directory is not what was written."""


def build_once(
    final: pathlib.Path,
    build: Callable[[pathlib.Path], None],
    load: Callable[[pathlib.Path], T],
    say: Callable[[str], None],
) -> T:
    """`load(final)`, after `build(directory)` if it is not there yet or is damaged.

    `final` appears by a rename when it is complete. Processes that want the same directory wait for the first one; on
    file systems without locks they may all build, and the first rename wins.
    """
    if final.is_dir():
        try:
            return load(final)
        except (DamagedError, UserError) as error:
            say(f"cache: {final} is damaged and is built again ({error})")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final) as locked:
            return _build_locked(final, locked, build, load)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"data.cache_dir: cannot write {final} ({reason}); set another directory") from error


def _build_locked(
    final: pathlib.Path, locked: bool, build: Callable[[pathlib.Path], None], load: Callable[[pathlib.Path], T]
) -> T:
    if final.is_dir():
        try:
            return load(final)  # another process was faster
        except (DamagedError, UserError):
            shutil.rmtree(final)
    if locked:  # whoever left these was killed while building
        for left_over in final.parent.glob(f"{final.name}.tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=final.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)  # mkdtemp's 0700 would shut out others who share the cache
        try:
            scratch.rename(final)
        except OSError:
            if not final.is_dir():  # without locks somebody may have been faster: theirs is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load(final)


@contextlib.contextmanager
def _lock(final: pathlib.Path) -> Iterator[bool]:
    """Whether the lock is held: some network file systems have none, and there the rename alone keeps us safe."""
    with open(final.with_name(final.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
