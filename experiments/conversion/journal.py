"""The directory beside `--to` in which a conversion happens, and what it remembers from one attempt to the next.

`<to>.converting/` holds `request.json` (what is being made, from which files), one journal per process, a line for every file
that was written and verified, and `result/`, which gets the name `--to` when everything is there.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from experiments.errors import UserError
from mdl.hf.safetensors_write import sync_directory

_SUFFIX = ".converting"


class Workspace:
    """Where the result grows. Several processes may use one at a time."""

    def __init__(self, to: pathlib.Path):
        self._to = to
        self.path = to.with_name(to.name + _SUFFIX)
        self.result = self.path / "result"

    def is_complete(self) -> bool:
        """Whether an earlier attempt was killed between the rename at the end and tidying up."""
        return self.path.is_dir() and not self.result.exists() and _holds_something(self._to)

    def check_free(self) -> None:
        """UserError if there is something in the place of the result."""
        if self._to.exists() and not self._to.is_dir():
            raise UserError(f"--to={self._to}: is a file; name a new directory")
        if _holds_something(self._to):
            raise UserError(f"--to={self._to}: holds files already; nothing is overwritten, name a new directory")

    def size(self) -> int:
        """Bytes on disk that an earlier attempt has taken already."""
        return sum(512 * file.stat().st_blocks for file in self.result.rglob("*"))

    def open(self, request: Mapping[str, Any]) -> None:
        """Begins, or goes on with, the work for `request`; UserError if another one has been begun here."""
        self.result.mkdir(parents=True, exist_ok=True)
        file = self.path / "request.json"
        unfinished = self.path / f"request.json.{os.getpid()}"
        unfinished.write_text(json.dumps(request, indent=1))
        with contextlib.suppress(FileExistsError):
            os.link(unfinished, file)  # the first of several processes wins
        unfinished.unlink()
        begun = json.loads(file.read_text())
        if differing := [key for key in request if begun.get(key) != request[key]]:
            raise UserError(
                f"{self.path}: holds the unfinished work of another request (differs in {', '.join(differing)}); "
                "finish it with the command that began it, or delete that directory"
            )

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        """Gives True to the one process that is to finish. Renames what it made, and tidies up."""
        try:
            lock = (self.path / "finish.lock").open("w")
        except FileNotFoundError:  # another process has finished
            yield False
            return
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.result.exists():
                yield False
                return
            yield True
            for directory, _, _ in os.walk(self.result):
                sync_directory(directory)
            self.result.rename(self._to)  # also in the place of an empty directory
            sync_directory(self._to.parent)
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Journal:
    """What is done, by all processes so far, in `with`. Threads may call every method."""

    def __init__(self, workspace: Workspace, process: int):
        self._directory = workspace.path
        self._file = workspace.path / f"journal.{process}"
        self._lock = threading.Lock()
        self._stream: TextIO | None = None
        self.sums: dict[str, dict[str, int]] = {}

    def __enter__(self) -> "Journal":
        self._stream = self._file.open("a")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            raise UserError(f"{self._file}: another process is at this work; wait for it, or end it") from error
        self._stream.write("\n")  # ends a line that a kill has cut
        self._stream.flush()
        self.reload()
        return self

    def __exit__(self, *exception) -> None:
        if self._stream:
            self._stream.close()

    def reload(self) -> None:
        """Reads what other processes have done meanwhile."""
        for file in sorted(self._directory.glob("journal.*")):
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):  # cut, or empty
                    done = json.loads(line)
                    self.sums[done["done"]] = done["sums"]

    def done(self, unit: str, sums: dict[str, int]) -> None:
        with self._lock:
            self.sums[unit] = sums
            assert self._stream
            self._stream.write(json.dumps({"done": unit, "sums": sums}) + "\n")
            self._stream.flush()


def _holds_something(directory: pathlib.Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())
