"""How fast a run goes, and profiler traces of chosen steps."""

import pathlib
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax

T = TypeVar("T")


class Meter:
    """Speed of each step, from the moments at which steps are finished; evaluation and saving are left out.

    data_wait is the share of the time between two such moments in which the loop waited for a batch.
    """

    def __init__(self, flops_per_token: float, peak_flops: float):
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._last = time.perf_counter()
        self._paused_at: float | None = None
        self._tokens: dict[int, int] = {}
        self._waited = 0.0

    def waiting_for_data(self, step: int, next_batch: Any) -> Any:
        """Calls `next_batch` and remembers how long that took and how many tokens it brought."""
        began = time.perf_counter()
        tokens_seen, batch = next_batch()
        self._waited += time.perf_counter() - began
        A, B, length = batch["tokens"].shape
        self._tokens[step] = A * B * (length - 1)
        return tokens_seen, batch

    def finished(self, step: int) -> dict[str, float]:
        """Metrics of `step`, to be called once its results are on the host."""
        now = self._paused_at or time.perf_counter()
        seconds, self._last = max(now - self._last, 1e-9), now
        waited, self._waited = self._waited, 0.0
        tokens_per_second = self._tokens.pop(step) / seconds
        return {
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self._flops_per_token / self._peak_flops,
            "step_ms": 1000 * seconds,
            "data_wait": waited / seconds,
        }

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        self._paused_at, self._last = None, time.perf_counter()


class Profiler:
    """Writes a profiler trace of the steps first..last; a context manager."""

    def __init__(self, steps: tuple[int, int] | None, directory: pathlib.Path, say: Callable[[str], None]):
        self._steps, self._directory, self._say, self._running = steps, directory, say, False

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        if self._running and self._steps and step >= self._steps[1]:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        self._say(f"profiler trace written to {self._directory}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._stop()
