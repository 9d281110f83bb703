"""Timing, and results with what is needed to read them in a year."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportFlags:
    out: str | None = None  # file for the result; none: it is printed


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchFlags(ReportFlags):
    repeats: int = 10  # timed repetitions; the median counts

    def __post_init__(self):
        if self.repeats < 1:
            raise UserError(f"--repeats={self.repeats} must be at least 1")


def seconds(run: Callable[[], Any], repeats: int, warmups: int = 2, limit: float = math.inf) -> list[float]:
    """Wall time of each repetition, results waited for; after `limit` seconds of them no further one begins."""
    for _ in range(warmups):
        jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < repeats and sum(times) < limit:
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return times


def interleaved_seconds(
    runs: dict[str, Callable[[], Any]], repeats: int, warmups: int = 2, limit: float = math.inf
) -> dict[str, float]:
    """Median wall time of each, measured in turns, so that noise of the machine meets all of them alike.

    After `limit` seconds no further turn begins.
    """
    for _ in range(warmups):
        for run in runs.values():
            jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - began > limit:
            break
        for name, run in runs.items():
            times[name] += seconds(run, 1, warmups=0)
    return {name: statistics.median(values) for name, values in times.items()}


def report(name: str, flags: ReportFlags, results: Any) -> None:
    """Prints the result, or writes it to `--out`."""
    text = json.dumps({"bench": name, **provenance(), "results": results}, indent=2)
    if flags.out is None:
        print(text)
        return
    pathlib.Path(flags.out).write_text(text + "\n")
    print(flags.out)


def provenance() -> dict[str, Any]:
    """Date, commit, versions and device."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
    )
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip() if git.returncode == 0 else None,
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")},
        },
        "device": {"kind": device.device_kind, "count": jax.device_count(), "machine": platform.machine()},
    }
