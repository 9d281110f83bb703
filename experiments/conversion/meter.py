"""A line at intervals: how much is done, how fast, how long still."""

import threading
import time
from collections.abc import Callable

from experiments.progress import format_seconds

SECONDS = 5.0  # between two lines


class Meter:
    """Counts bytes from several threads. `done` were done before; `clock` returns seconds."""

    def __init__(
        self,
        total: int,
        done: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._before, self._done = total, done, done
        self._say, self._clock = say, clock
        self._start = self._last = clock()
        self._lock = threading.Lock()

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            now = self._clock()
            if now - self._last >= SECONDS:
                self._last = now
                self._say(self._line(now - self._start))

    @property
    def moved(self) -> int:
        """Bytes since the beginning."""
        return self._done - self._before

    def _line(self, seconds: float) -> str:
        rate = self.moved / seconds
        left = format_seconds((self._total - self._done) / rate) if rate else "?"
        share = self._done / max(self._total, 1)
        return (
            f"{format_bytes(self._done)} of {format_bytes(self._total)} ({100 * share:.1f} %)  "
            f"{format_bytes(rate)}/s  left {left}"
        )


def format_bytes(count: float) -> str:
    """Three digits and a unit: 950 B, 12.3 MB, 1.05 TB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            scaled = count / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return f"{count:.0f} B"
