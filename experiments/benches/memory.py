"""Resident memory and open files of a training run, step by step: in the long run neither may grow."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.benches.memory_plot import plot
from experiments.benches.report import ReportFlags, report
from experiments.cli import parse_flags
from experiments.errors import UserError

_OWN = ("--out", "--plot", "--every", "--help")
_SETTLED = 0.2  # share of a run after which it must be flat: by then everything is compiled, evaluated and saved once
_WINDOWS = 8  # parts of the rest, in each of which what comes or goes for a while is the lesser part


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryFlags(ReportFlags):
    """Everything else on the command line goes to `experiments.run`."""

    every: int = 100  # steps between two samples
    plot: str | None = None  # picture of the samples

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"--every={self.every} must be at least 1")


class Sample(NamedTuple):
    step: int
    rss_bytes: int
    open_files: int


def main(argv: list[str]) -> None:
    own = [argument for argument in argv if argument.partition("=")[0] in _OWN]
    flags = parse_flags(own, MemoryFlags)
    if not sys.platform.startswith("linux"):
        raise UserError("bench memory reads /proc, which only Linux has")
    rest = [argument for argument in argv if argument not in own]
    samples = list(sample_run([*rest, f"--config.log.every={flags.every}"]))
    results = {"run": [argument for argument in rest if not argument.startswith("--workdir")], **figures(samples)}
    if flags.plot is not None:
        plot(results, pathlib.Path(flags.plot))
    report("memory", flags, results)


def sample_run(arguments: list[str]) -> Iterator[Sample]:
    """Runs `experiments.run` in a process of its own and looks at it whenever it prints a step. UserError if it fails."""
    command = [sys.executable, "-m", "experiments.run", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", file=sys.stderr)
            if printed := re.match(r"step +(\d+)/", line):
                yield look(int(printed[1]), run.pid)
    if run.returncode:
        raise UserError(
            f"experiments.run {' '.join(arguments)}: ended with exit code {run.returncode}, as it says above"
        )


def look(step: int, pid: int) -> Sample:
    process = pathlib.Path("/proc", str(pid))
    pages = int((process / "statm").read_text().split()[1])
    return Sample(step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(process / "fd")))


def figures(samples: list[Sample]) -> dict[str, Any]:
    """The samples by column, and how much grows in a step: slopes of straight lines through all but the first fifth.

    That of memory goes through the medians of its eighths: evaluations take some for a while, and saves give some back for a while.
    """
    if len(samples) < 2 * _WINDOWS:
        raise UserError(f"{len(samples)} samples say nothing: raise --config.train.num_steps or lower --every")
    settled = np.array([each for each in samples if each.step > _SETTLED * samples[-1].step], float)
    step, rss, files = settled.T
    middle = np.array([np.median(window, axis=0) for window in np.array_split(settled, _WINDOWS)])
    return {
        "rss_bytes_per_step": float(np.polyfit(middle[:, 0], middle[:, 1], 1)[0]),
        "open_files_per_step": float(np.polyfit(step, files, 1)[0]),
        "settled_after_step": int(step[0]),
        "rss_bytes_settled": {"least": int(rss.min()), "most": int(rss.max())},
        "open_files_settled": {"least": int(files.min()), "most": int(files.max())},
        "samples": {name: [getattr(each, name) for each in samples] for name in Sample._fields},
    }
