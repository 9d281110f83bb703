"""Where the numbers of a run go: `metrics.jsonl` always, TensorBoard events by default, Weights & Biases when asked for.

`metrics.jsonl` has one line a step; `step` counts the updates made, so the first is 1. Names that the printed line and
the plot know: `loss`, `loss/main`, `loss/mtp_1`, `loss/balance`, `loss/z`, `bpb`, `grad_norm`, `learning_rate`,
`tokens`, `tokens_per_second`, `mfu`, `step_ms`, `data_wait` (share of the step), `load/max_violation`,
`load/entropy`, `load/drop_rate`, `indexer/kl`, `indexer/uniform`, `skipped_steps`, `val/loss`, `val/bpb`,
`val/acceptance/mtp_1`, `val/indexer/recall`.

JSON has no NaN and no infinity: such a value is written as null, its name stays.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.errors import UserError
from experiments.tensorboard import EventWriter

FILE_NAME = "metrics.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = 10  # steps between two printed lines
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl
    wandb: bool = False  # send metrics to Weights & Biases
    wandb_project: str = "mdl"  # its project
    wandb_name: str | None = None  # its name for the run; none: the name of the run directory

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"every={self.every} must be at least 1")

    def check(self) -> None:
        """UserError if a package that is asked for is not installed; `build` checks too, but later in a run."""
        if self.wandb:
            _import_wandb()

    def build(self, workdir: str | os.PathLike, *, restored_step: int = 0, run_config: Any = None) -> "MetricsWriter":
        """The writer of the process that writes; the others use `NoMetricsWriter`."""
        return MetricsWriter(workdir, self, restored_step=restored_step, run_config=run_config)


class MetricsWriter:
    """Writes each step once; a context manager.

    Lines after `restored_step` are cut from an earlier `metrics.jsonl`, because those steps will be run again (0 for a
    run that starts anew). `run_config` is the JSON of the config, for Weights & Biases.
    Raises UserError if a package that the config asks for is missing.
    """

    def __init__(
        self, workdir: str | os.PathLike, config: LogConfig, *, restored_step: int = 0, run_config: Any = None
    ):
        wandb = _import_wandb() if config.wandb else None
        self._workdir = workdir = pathlib.Path(workdir).absolute()
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / FILE_NAME
        resumes = path.exists()
        truncate_after(path, restored_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._events = (
            EventWriter(workdir, resume_step=restored_step + 1 if resumes else None) if config.tensorboard else None
        )
        self._wandb = wandb and wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or workdir.name,
            id=hashlib.sha256(str(workdir).encode()).hexdigest()[:16],  # the same run again when it is resumed
            resume="allow",
            dir=str(workdir),
            config=run_config,
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One flushed line. Values are numbers, or arrays of numbers, which go to `metrics.jsonl` alone.

        Raises UserError if the disk is full.
        """
        plain = {name: np.asarray(value).tolist() for name, value in values.items()}
        line = {"step": int(step)} | {name: _finite(value) for name, value in plain.items()}
        scalars = {name: value for name, value in plain.items() if not isinstance(value, list)}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            if self._events:
                self._events.scalars(step, scalars)
        except OSError as error:
            raise UserError(f"step {step}: cannot write metrics to {self._workdir} ({error.strerror})") from error
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was reported by write()
            self._file.close()
        with contextlib.suppress(OSError):
            if self._events:
                self._events.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class NoMetricsWriter:
    """Stands in for MetricsWriter on every process but the first: writes nothing."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> "NoMetricsWriter":
        return self

    def __exit__(self, *exc) -> None:
        pass


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a line torn by a killed process is left out."""
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def truncate_after(path: str | os.PathLike, step: int) -> None:
    """Cuts what stands after `step`, and torn lines, in one atomic replacement."""
    path = pathlib.Path(path)
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _import_wandb() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("log.wandb=true: wandb is not installed; run `pip install wandb`") from error
    return wandb
