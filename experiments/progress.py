"""What a person watches: one plain line per interval and, on a terminal, a live bar below the lines."""

import collections
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO


class Progress:
    """Prints every `every`-th step of a run, the first and the last; a context manager.

    The lines are the same on a terminal and in a file. `clock` returns seconds.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        every: int,
        first_step: int = 1,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps, self._every, self._first_step = num_steps, every, first_step
        self._file = file or sys.stdout
        self._left = TimeLeft(num_steps, clock)
        self._bar = _LiveBar(num_steps, self._file) if self._file.isatty() else None

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """To be called once after each step, with the metrics of that step."""
        seconds_left = self._left.step(step)
        if self._bar:
            self._bar.update(step, seconds_left)
        if step % self._every == 0 or step in (self._first_step, self._num_steps):
            self.say(format_line(step, self._num_steps, values, seconds_left))

    def say(self, line: str) -> None:
        """Prints a line of one's own above the bar."""
        if self._bar:
            self._bar.say(line)
        else:
            print(line, file=self._file, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        if self._bar:
            self._bar.close()


class TimeLeft:
    """Seconds until the last step, from the mean of the latest intervals.

    The time before the first step (compilation) is not among them, and the longest one is left out: it holds what
    happens once, such as compiling the evaluation. The others count in full, pauses for evaluation included.
    """

    def __init__(self, num_steps: int, clock: Callable[[], float]):
        self._num_steps, self._clock = num_steps, clock
        self._intervals: collections.deque[float] = collections.deque(maxlen=1000)
        self._last: float | None = None

    def step(self, step: int) -> float | None:
        """The estimate after `step`; None while there is nothing to go by."""
        now = self._clock()
        if self._last is not None:
            self._intervals.append(now - self._last)
        self._last = now
        if len(self._intervals) < 2:
            return None
        mean = (sum(self._intervals) - max(self._intervals)) / (len(self._intervals) - 1)
        return mean * (self._num_steps - step)


def format_line(step: int, num_steps: int, values: Mapping[str, Any], seconds_left: float | None) -> str:
    """`step   20/200  loss 3.2145  lr 1.00e-03  …  left 1:05`; what is absent from `values` is left out."""
    width = len(str(num_steps))
    parts = [f"step {step:>{width}}/{num_steps}"]
    parts += [text(float(values[name])) for name, text in _COLUMNS.items() if values.get(name) is not None]
    if seconds_left is not None and step < num_steps:
        parts.append(f"left {format_seconds(seconds_left)}")
    return "  ".join(filter(None, parts))


def format_seconds(seconds: float) -> str:
    """`0:07`, `12:05`, `3:07:00` or `2d 04:10`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_count(value: float) -> str:
    """Three digits and a unit: 950, 12.3k, 1.05M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0f}" if math.isfinite(value) else str(value)


_COLUMNS: dict[str, Callable[[float], str]] = {
    "loss": lambda x: f"loss {x:.4f}",
    "bpb": lambda x: f"bpb {x:.3f}",
    "val/loss": lambda x: f"val loss {x:.4f}",
    "val/bpb": lambda x: f"val bpb {x:.4f}",
    "learning_rate": lambda x: f"lr {x:.2e}",
    "grad_norm": lambda x: f"grad {x:.2f}",
    "tokens_per_second": lambda x: f"{format_count(x)} tok/s",
    "mfu": lambda x: f"mfu {100 * x:.1f}%",
    "step_ms": lambda x: f"{x:.0f} ms" if x >= 9.95 else f"{x:.1f} ms",
    "data_wait": lambda x: f"wait {100 * x:.1f}%",
    "indexer/kl": lambda x: f"kl {x:.3f}",
    "val/acceptance/mtp_1": lambda x: f"drafts {100 * x:.1f}%",
    "val/indexer/recall": lambda x: f"recall {100 * x:.1f}%",
    "load/max_violation": lambda x: f"max-vio {x:.2f}",
    "skipped_steps": lambda x: f"skipped {x:.0f}" if x else "",
}


class _LiveBar:
    def __init__(self, num_steps: int, file: TextIO):
        import rich.console
        import rich.progress

        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("training"),
            rich.progress.BarColumn(bar_width=40),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[left]}"),
            console=rich.console.Console(file=file, highlight=False),
            transient=True,
        )
        self._task = self._progress.add_task("training", total=num_steps, left="compiling")
        self._progress.start()

    def update(self, step: int, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f"left {format_seconds(seconds_left)}"
        self._progress.update(self._task, completed=step, left=left)

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
