"""Carries conversion out: threads over pieces of units, in bounded memory; every unit is read back when it is whole."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Protocol

from experiments.conversion.journal import Journal
from experiments.conversion.meter import Meter
from experiments.errors import UserError

Sums = dict[str, int]  # by tensor or array, see `arrays.sum_of_words`


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one thread does at a time."""

    memory: int  # bytes it needs
    run: Callable[[], int]  # returns the bytes that it wrote


class Job(Protocol):
    """A unit being written."""

    @property
    def pieces(self) -> Sequence[Piece]: ...

    def finish(self) -> Sums:
        """After all pieces; returns the sums of what was written."""
        ...

    def abandon(self) -> None:
        """Instead of `finish`."""
        ...


class Unit(Protocol):
    """What is written as a whole or begun again after a kill: a file."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    def begin(self) -> Job: ...

    def verify(self, sums: Sums) -> bool:
        """Makes the finished unit last and reads it back; returns whether it holds these sums."""
        ...


def carry_out(units: Sequence[Unit], journal: Journal, meter: Meter, memory: int) -> None:
    """Writes and verifies those units that the journal does not know; UserError naming one that reads back changed."""
    with _Pool(memory) as pool:
        for unit in units:
            if unit.name not in journal.sums:
                _carry_out(unit, pool, journal, meter)


def _carry_out(unit: Unit, pool: "_Pool", journal: Journal, meter: Meter) -> None:
    job = pool.opened(unit.begin())
    left, lock = len(job.pieces), threading.Lock()

    def run(piece: Piece) -> None:
        nonlocal left
        meter.advance(piece.run())
        with lock:
            left -= 1
            is_last = not left
        if is_last:
            pool.closed(job)
            sums = job.finish()
            if not unit.verify(sums):
                raise UserError(f"{unit.name} reads back changed: look at the disk; the same command writes it again")
            journal.done(unit.name, sums)

    for piece in job.pieces:
        pool.submit(piece.memory, lambda piece=piece: run(piece))


_WAITING = 4  # threads that, at a guess, wait for the disk


class _Pool(contextlib.AbstractContextManager):
    """Threads that together hold at most `memory` bytes, or one piece that needs more. The first error ends everything."""

    def __init__(self, memory: int):
        threads = _WAITING + (os.cpu_count() or 1)
        self._threads = futures.ThreadPoolExecutor(threads, thread_name_prefix="convert")
        self._memory, self._used = memory, 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._jobs: list[Job] = []

    def submit(self, memory: int, call: Callable[[], None]) -> None:
        """Waits for memory. Raises what has gone wrong in a thread."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or not self._used or self._used + memory <= self._memory
            )
            if self._error is not None:
                raise self._error
            self._used += memory
        self._threads.submit(self._run, memory, call)

    def _run(self, memory: int, call: Callable[[], None]) -> None:
        try:
            if self._error is None:
                call()
        except BaseException as error:  # of whatever kind: it is raised where the pieces are handed out
            self._error = self._error or error
        finally:
            with self._changed:
                self._used -= memory
                self._changed.notify()

    def opened(self, job: Job) -> Job:
        """The job will be abandoned if it is still there at the end."""
        self._jobs.append(job)
        return job

    def closed(self, job: Job) -> None:
        self._jobs.remove(job)

    def __exit__(self, kind, error, traceback) -> None:
        self._error = self._error or error
        self._threads.shutdown()
        for job in self._jobs:
            job.abandon()
        if error is None and self._error is not None:
            raise self._error


def share(units: Sequence[Unit], process: int, processes: int) -> Iterator[Unit]:
    """The units of one of several processes: every so many-th, so that all work on the same part of the source at a time."""
    yield from units[process::processes]
