"""`python -m experiments.run` on configs/small.py as real processes, and what such a run leaves behind."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "experiments" / "configs" / "small.py"
TIMEOUT_SECONDS = 240
TIMINGS = {"tokens_per_second", "mfu", "step_ms", "data_wait"}

# One dense layer and nothing else: it compiles fastest.
DENSE = (
    "--config.model.num_hidden_layers=1",
    "--config.model.moe=none",
    "--config.model.mtp=none",
    "--config.loss.mtp_loss_weight=none",
    "--config.loss.aux_loss_alpha=none",
    "--config.loss.bias_update_speed=none",
)


def write_corpus(folder: pathlib.Path) -> str:
    """24 short documents, the same in every session; returns their glob."""
    folder.mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(40)]
    for number in range(24):
        (folder / f"{number:02}.txt").write_text(" ".join(rng.choices(words, k=60)) + "\n")
    return str(folder / "*.txt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    code: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def children_hear_ctrl_c():
    """What a shell starts in the background ignores Ctrl-C, and passes that on to its children: not to those started here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """One process. Its stdout is a pipe of one page, so that it comes to a halt about 30 printed steps after the last line read."""

    def __init__(
        self,
        home,
        *arguments,
        devices=1,
        limit_file_size=None,
        compilation_cache=True,
        before="",
        root=ROOT,
        variables=None,
        timeout=TIMEOUT_SECONDS,
    ):
        """before: Python that the process runs first. root: the tree whose code it runs. timeout: when it is killed, in seconds."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XDG_CACHE_HOME": str(home.cache),
            "PYTHONUNBUFFERED": "1",
            "JAX_ENABLE_COMPILATION_CACHE": str(compilation_cache).lower(),
            **(variables or {}),
        }
        command = [sys.executable, "-m", "experiments.run", *map(str, arguments)]
        if before:
            code = f"{before}\nimport runpy\nrunpy.run_module('experiments.run', run_name='__main__', alter_sys=True)"
            command[1:3] = "-c", code
        if limit_file_size:
            command = ["prlimit", f"--fsize={limit_file_size}", *command]
        with children_hear_ctrl_c():
            self.process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
        self._guard = threading.Timer(timeout, self.process.kill)
        self._guard.start()
        fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        self._read = ""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._guard.cancel()
        self.process.kill()
        self.process.communicate()

    def wait_for(self, pattern: str) -> None:
        """Reads stdout up to a line in which `pattern` is found."""
        while line := self.process.stdout.readline().decode():
            self._read += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"no line with {pattern!r} in:\n{self._read}\n{self.process.stderr.read().decode()}")

    def wait_for_step(self, step: int) -> None:
        self.wait_for(rf"^step +{step}/")

    def wait_for_error_line(self) -> str:
        return self.process.stderr.readline().decode()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> Ended:
        stdout, stderr = self.process.communicate()
        return Ended(code=self.process.returncode, stdout=self._read + stdout.decode(), stderr=stderr.decode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Home:
    """Where runs of one test session find their corpus and their caches."""

    corpus: str
    cache: pathlib.Path

    def start(self, workdir, *arguments, **options) -> Run:
        return Run(self, f"--config={CONFIG}:{self.corpus}", f"--workdir={workdir}", *arguments, **options)

    def run(self, workdir, *arguments, **options) -> Ended:
        """Runs to the end and demands success."""
        with self.start(workdir, *arguments, **options) as run:
            ended = run.end()
        assert ended.code == 0, ended.stdout + ended.stderr
        return ended


def metrics(workdir) -> list[dict]:
    """The lines of metrics.jsonl without the timings; each step must stand there once, in order, nothing torn."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(line.keys() >= TIMINGS for line in lines)
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def newest(workdir) -> pathlib.Path:
    return max((workdir / "checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))


def checkpoint(workdir) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the JSON of the newest checkpoint, read by Orbax alone."""
    path = newest(workdir)
    meta = json.loads((path / "meta" / "metadata").read_text())
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path / "state").item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = reader.restore(path / "state", restore_args=kinds)
    return flatten(arrays), meta


def flatten(tree, path="") -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: leaf for key, child in tree.items() for name, leaf in flatten(child, f"{path}/{key}").items()}


def assert_same_run(workdir, reference) -> None:
    """Every logged number, digit for digit, and every bit of the newest checkpoint."""
    assert metrics(workdir) == metrics(reference)
    (arrays, meta), (expected, expected_meta) = checkpoint(workdir), checkpoint(reference)
    assert arrays.keys() == expected.keys() and len(arrays) > 40
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype and arrays[name].tobytes() == array.tobytes(), name
    assert (meta["step"], meta["data_states"]) == (expected_meta["step"], expected_meta["data_states"])


def assert_close_run(workdir, reference, *, ignore=()) -> None:
    """The same steps and losses but for rounding, which training magnifies."""
    lines, expected = metrics(workdir), metrics(reference)
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() - set(ignore) == other.keys()
        for name in ("loss", "loss/main", "loss/mtp_1", "learning_rate", "val/loss", "val/bpb"):
            if name in line:
                np.testing.assert_allclose(
                    line[name], other[name], rtol=1e-4 if line["step"] < 10 else 1e-2, err_msg=f"{line['step']} {name}"
                )


def copy(workdir, target, *, keep=None) -> pathlib.Path:
    """A copy of a run directory, with the checkpoints of the steps in `keep` alone."""
    shutil.copytree(workdir, target)
    for path in (target / "checkpoints").glob("step_*"):
        if keep is not None and int(path.name.removeprefix("step_")) not in keep:
            shutil.rmtree(path)
    return target
