"""Ctrl-C and SIGTERM: finish the step, save, exit with the conventional code; a second signal exits at once."""

import os
import signal
import socket
import sys
import threading
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Use in `with`; `requested()` tells the loop to stop. Exit codes: 130 for Ctrl-C, 143 for SIGTERM.

    A thread receives the signals: Python's own handlers wait until a compilation or a device returns.
    """

    def __init__(self):
        self._signal: int | None = None
        self._previous = {}

    def __enter__(self) -> Self:
        self._listener, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._woken.fileno())
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, name="interrupt", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._woken.close()  # ends the thread

    def _listen(self) -> None:
        with self._listener:
            while received := self._listener.recv(1):
                if received[0] in SIGNALS:
                    self._receive(received[0])

    def _receive(self, number: int) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        name = signal.Signals(number).name
        print(f"{name}: saving after this step, then leaving; once more to leave at once", file=sys.stderr, flush=True)

    def requested(self) -> int | None:
        """Exit code if any process was told to stop. On several processes every one must call this after every step."""
        code = 0 if self._signal is None else 128 + self._signal
        if jax.process_count() > 1:
            code = int(np.max(multihost_utils.process_allgather(np.int32(code))))
        return code or None
