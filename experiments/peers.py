"""The processes of one run: what they tell each other without devices, and what happens when one of them is gone.

They meet in the key-value store of the coordination service that `jax.distributed.initialize` starts. Its client has no
public name, and this file alone uses it: the public `multihost_utils` compile a program for all devices, which is too
late to refuse a config, and wait for ever for a process that is gone.
"""

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Self

import jax
from jax._src import distributed

from experiments.errors import UserError

GONE = 75  # exit code of the processes that are left over: EX_TEMPFAIL, start all of them again

BEAT_SECONDS = 2.0
MISSED_BEATS = 12  # so many beats without a sign of life, and a process is gone
LEAVING_BEATS = 5  # so many have the others to leave by themselves, after a process has failed
_LOST_BEATS = 3  # so often the store does not answer, and process 0 is gone
_FOREVER_MS = 7 * 24 * 3600 * 1000  # one process may tokenize a corpus for long while the others wait
_SIGNS, _VERDICT = "mdl/signs", "mdl/verdict"
_ENDED, _FAILED = "ended", "failed"

_calls = itertools.count()
_handlers: list[Any] = []


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, in their order. Every process calls it, and waits for all."""
    state = distributed.global_state
    if state.client is None:
        return [value]
    call = next(_calls)
    key = f"mdl/gather_{call}"
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps(value))
    state.client.wait_at_barrier(key, _FOREVER_MS)
    if state.process_id == 0:  # all have read what was gathered before this
        state.client.key_value_delete(f"mdl/gather_{call - 1}/")
    return [json.loads(text) for _, text in sorted(_read(key).items())]


def of_first(value: Any) -> Any:
    """The JSON value of process 0. Every process calls it."""
    state = distributed.global_state
    if state.client is None:
        return value
    key = f"mdl/of_first_{next(_calls)}"
    if state.process_id == 0:
        state.client.key_value_set(key, json.dumps(value))
    return json.loads(state.client.blocking_key_value_get(key, _FOREVER_MS))


def are_several() -> bool:
    """Whether this run has more than one process."""
    return distributed.global_state.client is not None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that every process enters: a UserError in any of them becomes one in all, which names the process.

    Nothing in the block may wait for the other processes: one that has failed no longer comes.
    """
    failure = None
    try:
        yield
    except UserError as error:
        if not are_several():
            raise
        failure = str(error)
    outcomes = gather([socket.gethostname(), failure])
    failed: dict[str, list[str]] = {}
    for process, (host, text) in enumerate(outcomes):
        if text is not None:
            failed.setdefault(text, []).append(f"{process} ({host})")
    if failure is not None and list(map(len, failed.values())) == [len(outcomes)]:
        raise UserError(failure)
    if failed:
        raise UserError("; ".join(f"process {_some(who)}: {text}" for text, who in failed.items()))


def explain_abort(explain: Callable[[], str | None]) -> None:
    """Where JAX aborts this process, for another one that it cannot reach: ends it with this line, unless that is None.

    JAX's own words, on stderr above it, tell a process by its number at most. It aborts in threads of C++, where
    Python's own handlers of signals are not heard.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        if line := explain():
            _end(line)

    _handlers.append(handler)  # for as long as it may be called
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


class Watch:
    """Ends this process, with exit code 75, when another one of its run is gone; used in `with` by every process.

    Each process gives a sign of life every two seconds, in a thread. Process 0, which has the store, watches for them.
    A process that leaves the block with an error says so, and the others end with its error unless they have one of
    their own. `what_remains` is the end of the line that is said.
    """

    def __init__(self, what_remains: Callable[[], str]):
        self._what_remains = what_remains
        self._client: Any = distributed.global_state.client
        self._process = distributed.global_state.process_id
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        if self._client is not None:
            self._hosts = gather(socket.gethostname())
            self._thread.start()
            explain_abort(self._why_aborted)
        return self

    def __exit__(self, exc_type: Any, exc: BaseException | None, traceback: Any) -> None:
        if self._client is None:
            return
        if any(isinstance(error, jax.errors.JaxRuntimeError) for error in (exc, exc and exc.__cause__)):
            # A collective fails where another process is gone. Soon it is known which one, and this process ends.
            self._thread.join((MISSED_BEATS + LEAVING_BEATS) * BEAT_SECONDS)
        self._leaves.set()
        self._thread.join()
        sign = _ENDED if exc is None else f"{_FAILED}: {str(exc) or type(exc).__name__}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._give_sign(sign)
        if exc is not None:
            atexit.register(self._leave, sign, _exit_code(exc))

    def _leave(self, sign: str, exit_code: int) -> NoReturn:
        """Instead of JAX's farewell, which waits minutes for the others, who may be waiting for this process."""
        if self._process == 0 and not self._others_leave():
            self._pronounce(f"process 0 ({self._hosts[0]}) {sign}")
        sys.stdout.flush()
        os._exit(exit_code)

    def _others_leave(self) -> bool:
        for _ in range(10 * LEAVING_BEATS):
            signs = _read(_SIGNS)
            if all(_is_last(signs.get(process, "")) for process in range(1, len(self._hosts))):
                return True
            time.sleep(BEAT_SECONDS / 10)
        return False

    def _run(self) -> None:
        judge, unanswered = Judge(self._hosts), 0
        for beat in itertools.count():
            verdict = None
            try:
                self._give_sign(str(beat))
                if self._process == 0:
                    verdict = judge.verdict(_read(_SIGNS))
                    if verdict:
                        self._pronounce(verdict)
                else:
                    verdict = _read(_VERDICT).get(0)
                unanswered = 0
            except jax.errors.JaxRuntimeError:
                unanswered += 1
                if unanswered == _LOST_BEATS:
                    verdict = f"process 0 ({self._hosts[0]}) is gone"
            if verdict:
                _end(self._with_what_remains(verdict))
            if self._leaves.wait(BEAT_SECONDS):
                return

    def _why_aborted(self) -> str | None:
        host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            return self._with_what_remains(f"process 0 ({self._hosts[0]}) is gone")
        return None

    def _give_sign(self, sign: str) -> None:
        self._client.key_value_set(f"{_SIGNS}/{self._process}", sign, allow_overwrite=True)

    def _pronounce(self, verdict: str) -> None:
        """Tells the other processes, and gives them time to read while there is a store."""
        self._client.key_value_set(f"{_VERDICT}/0", verdict)
        time.sleep(2 * BEAT_SECONDS)

    def _with_what_remains(self, verdict: str) -> str:
        with contextlib.suppress(Exception):  # whatever there is with the disk: this process ends
            verdict += f"; {self._what_remains()}"
        return verdict


class Judge:
    """Decides who is gone from the signs of life, looked at once a beat.

    It counts its own beats: clocks are not compared, and whoever was stopped himself has counted nothing meanwhile.
    """

    def __init__(self, hosts: Sequence[str]):
        self._hosts = hosts
        self._last: dict[int, str] = {}
        self._missed = dict.fromkeys(range(len(hosts)), 0)

    def verdict(self, signs: Mapping[int, str]) -> str | None:
        """`process 1 (host) is gone`, or `failed: …` with its error; None while all is well."""
        for process, host in enumerate(self._hosts):
            sign = signs.get(process, "")
            self._missed[process] = self._missed[process] + 1 if sign == self._last.get(process) else 0
            self._last[process] = sign
            if sign.startswith(_FAILED) and self._missed[process] >= LEAVING_BEATS:
                return f"process {process} ({host}) {sign}"
            if not _is_last(sign) and self._missed[process] >= MISSED_BEATS:
                return f"process {process} ({host}) is gone"
        return None


def _end(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(GONE)


def _exit_code(error: BaseException) -> int:
    return 2 if isinstance(error, UserError) else 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _is_last(sign: str) -> bool:
    return sign.startswith((_ENDED, _FAILED))


def _read(directory: str) -> dict[int, str]:
    """The entries of a directory of the store whose names are numbers of processes."""
    found = distributed.global_state.client.key_value_dir_get(directory)  # pyright: ignore[reportOptionalMemberAccess]
    return {int(key.rpartition("/")[2]): value for key, value in found}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
