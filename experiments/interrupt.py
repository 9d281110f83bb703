"""Ctrl-C and SIGTERM: finish the step, save, exit with the conventional code; a second signal exits at once."""

import os
import signal
import sys
from types import FrameType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupt:
    """Use in `with`; `requested()` tells the loop to stop. Exit codes: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self):
        self._signal: int | None = None
        self._previous = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
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
