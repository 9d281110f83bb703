"""What goes wrong between the processes of a run: said by all of them in one line, and nothing saved is lost."""

import dataclasses
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import time

import pytest
from small_runs import CONFIG, DENSE, ROOT, assert_same_run, checkpoint, copy, metrics, newest

from experiments import checkpoint_read, resume, train
from experiments.checkpoint import CheckpointConfig, saved_steps
from experiments.config import ExperimentConfig
from experiments.data.pipeline import DataConfig
from experiments.errors import UserError
from experiments.peers import GONE, LEAVING_BEATS, MISSED_BEATS, Judge

HOST = re.escape(socket.gethostname())
QUICK_BEATS = "from experiments import peers; peers.BEAT_SECONDS = 0.5"


def end_with_one_error(runs) -> tuple[int, str]:
    """Their exit code and the last line of their stderr, which must be the same."""
    ended = [run.end() for run in runs]
    assert len({(each.code, each.stderr.splitlines()[-1]) for each in ended}) == 1, ended
    return ended[0].code, ended[0].stderr.splitlines()[-1]


def test_another_config_and_other_code_are_refused_before_a_device_is_used(two_processes, tmp_path):
    other = tmp_path / "other"
    for package in ("experiments", "mdl", "kernels_pallas", "configs", "tests/experiments/configs"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = other / "mdl" / "loss.py"
    changed.write_text(changed.read_text() + "\n# one more line\n")
    no_device = {"JAX_PLATFORMS": "a_platform_that_does_not_exist"}
    each = {1: {"root": other, "arguments": ["--config.train.seq_len=8", "--config.train.num_steps=50"]}}
    code, line = end_with_one_error(two_processes(tmp_path / "run", variables=no_device, each=each))
    assert code == 2
    assert re.match(rf"error: process 1 \({HOST}\): config\.train\.num_steps is 50, 40 on process 0; ", line), line
    assert "config.train.seq_len is 8, 16 on process 0; code mdl/loss.py is " in line and "more" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["07.txt", pytest.param("*.txt", marks=pytest.mark.slow)])
def test_a_missing_shard_is_named_with_its_process(missing, two_processes, home, tmp_path):
    homes = [tmp_path / "a", tmp_path / "b"]
    for folder in homes:
        shutil.copytree(pathlib.Path(home.corpus).parent, folder / "corpus")
    arguments = [f"--config={CONFIG}:~/corpus/*.txt"]
    each = {process: {"variables": {"HOME": str(homes[process])}, "arguments": arguments} for process in range(2)}
    for path in (homes[1] / "corpus").glob(missing):
        path.unlink()
    code, line = end_with_one_error(two_processes(tmp_path / "run", each=each))
    said = {
        "07.txt": "data.source file 07.txt is absent, there on process 0",
        "*.txt": "data.source.paths='~/corpus/*.txt': no such file",
    }[missing]
    assert code == 2 and line.startswith(f"error: process 1 ({socket.gethostname()}): {said}"), line
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_not_shared_is_refused(two_processes, tmp_path):
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        host.mkdir()
        for package in ("experiments", "mdl", "kernels_pallas"):
            (host / package).symlink_to(ROOT / package)
    code, line = end_with_one_error(
        two_processes("run", each={process: {"root": hosts[process]} for process in range(2)})
    )
    assert code == 2
    assert line == (
        f"error: process 1 ({socket.gethostname()}): {hosts[1]}/run/checkpoints is not the directory that process 0 writes "
        "to; name one that all processes share in --workdir or checkpoint.directory"
    )


def test_a_url_never_becomes_a_directory_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ExperimentConfig()
    for command in (train.train, train.evaluate):
        with pytest.raises(
            UserError, match=r"^--workdir=gs://b/run: .*name a directory, and checkpoint.directory=gs://b/run$"
        ):
            command(config, "gs://b/run")
    with pytest.raises(UserError, match=r"^data\.cache_dir=gs://b/c: must lie in the file system of this machine"):
        DataConfig(cache_dir="gs://b/c").build(16, 0)

    def checkpoints(directory):
        return resume.checkpoints(
            dataclasses.replace(config, checkpoint=CheckpointConfig(directory=directory)), tmp_path
        )

    for store in ("s3", "file", "az"):
        with pytest.raises(
            UserError, match=f"^{store}://b/c: checkpoints lie in directories and in gs://; mount other stores"
        ):
            checkpoints(f"{store}://b/c")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^gs://b/c: needs gcsfs, .*; run `pip install gcsfs`$"):
        checkpoints("gs://b/c")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert str(checkpoints("gs://b/c") / "step_1") == "gs://b/c/step_1"
    assert not list(tmp_path.iterdir())


def test_checkpoints_may_be_kept_elsewhere(home, uninterrupted, tmp_path):
    kept = copy(uninterrupted, tmp_path / "before", keep=[20]) / "checkpoints"
    ended = home.run(
        tmp_path / "run", f"--config.checkpoint.directory={kept}"
    )  # as after the loss of a host and its disk
    assert "resumed from the checkpoint of step 20" in ended.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert checkpoint_read.read_config(tmp_path / "run").step == 40  # found by way of the run
    (arrays, meta), (expected, _) = checkpoint(tmp_path / "before"), checkpoint(uninterrupted)
    assert meta["step"] == 40 and all(arrays[name].tobytes() == array.tobytes() for name, array in expected.items())


def test_the_others_end_when_one_is_killed_and_another_number_goes_on(home, two_processes, tmp_path):
    workdir = tmp_path / "run"
    first, second = two_processes(workdir, *DENSE, "--config.mesh.fsdp=2", before=QUICK_BEATS)
    first.wait_for_step(25)
    step = killed(second, first, workdir, "process 1")
    assert step >= 20
    ended = home.run(workdir, *DENSE, devices=2)
    assert f"resumed from the checkpoint of step {step}" in ended.stdout
    assert len(metrics(workdir)) == 40 and newest(workdir).name == "step_40"


def killed(run, other, workdir, name) -> int:
    """Kills one process; checks how the other one ends, and returns the step that it says is saved."""
    run.signal(signal.SIGKILL)
    since = time.monotonic()
    ended = other.end()
    assert ended.code == GONE and time.monotonic() - since < 60, ended
    steps = saved_steps(workdir / "checkpoints")
    assert ended.stderr.splitlines()[-1] == (
        f"error: {name} ({socket.gethostname()}) is gone; the last complete checkpoint is of step {steps[-1]}; "
        "start all processes again to go on from there"
    )
    return steps[-1]


@pytest.mark.slow
def test_a_run_of_two_processes_ends_bit_for_bit_as_one_whose_processes_are_never_killed(two_processes, tmp_path):
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    dense = [*DENSE, "--config.mesh.fsdp=2"]
    assert [run.end().code for run in two_processes(alone, *dense)] == [0, 0]

    first, second = two_processes(workdir, *dense)
    first.wait_for_step(13)
    step = killed(second, first, workdir, "process 1")

    first, second = two_processes(workdir, *dense)
    first.wait_for(f"resumed from the checkpoint of step {step}$")
    first.wait_for_step(step + 5)
    while not list((workdir / "checkpoints").glob("*tmp*")):  # the next one is being written
        assert first.process.poll() is None
    step = killed(second, first, workdir, "process 1")

    first, second = two_processes(workdir, *dense)
    first.wait_for(f"resumed from the checkpoint of step {step}$")
    first.wait_for_step(step + 3)
    step = killed(first, second, workdir, "process 0")

    first, second = two_processes(workdir, *dense)
    first.wait_for(f"resumed from the checkpoint of step {step}$")
    first.wait_for_step(step + 3)
    for run in (first, second):  # as when all machines are taken away
        run.signal(signal.SIGTERM)
    ended = [first.end(), second.end()]
    assert [each.code for each in ended] == [143, 143], ended
    step = len(metrics(workdir))
    assert f"stopped at step {step} and saved" in ended[0].stdout and newest(workdir).name == f"step_{step}"

    assert [run.end().code for run in two_processes(workdir, *dense)] == [0, 0]
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_clocks_that_differ_change_nothing(two_processes, tmp_path):
    """The lines of a run are ordered by their steps, all of process 0; the newest checkpoint is that of the last step."""
    ahead = "import time; now = time.time; time.time = lambda: now() + 86_400"
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    assert [run.end().code for run in two_processes(alone, *DENSE)] == [0, 0]
    steps = []
    for process, code in ((0, 143), (1, 0)):  # it goes on a day before it stopped
        first, second = two_processes(workdir, *DENSE, each={process: {"before": ahead}})
        first.wait_for_step(len(steps) + 15)
        if code:
            second.signal(signal.SIGTERM)
        ended = [first.end(), second.end()]
        assert [each.code for each in ended] == [code, code], ended
        assert "step " not in ended[1].stdout
        steps += map(int, re.findall(r"^step +(\d+)/", ended[0].stdout, re.MULTILINE))
    assert steps == list(range(1, 41))
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_a_hundred_kills(home, tmp_path):
    """SIGKILL at random moments of one run: it ends as the run that nothing happened to, bit for bit."""
    kills = int(os.environ.get("MDL_TEST_KILLS", "100"))
    length = f"--config.train.num_steps={20 * kills + 40}", "--config.eval.every=1000"
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    home.run(alone, *length, timeout=3600)
    starting = saving = 0
    for kill in range(kills):
        rng = random.Random(kill)
        with home.start(workdir, *length) as run:
            if kill % 4 == 0:
                time.sleep(rng.uniform(0, 10))  # starting, restoring, compiling
            else:
                for _ in range(rng.randint(1, 45)):  # a checkpoint is complete before the one of ten steps later begins
                    run.wait_for(r"^step +\d+/")
                time.sleep(rng.uniform(0, 0.1))
            run.signal(signal.SIGKILL)
            ended = run.end()
            assert ended.code == -signal.SIGKILL, ended.stderr
        starting += "\nstep " not in ended.stdout
        saving += bool(list(workdir.glob("checkpoints/*tmp*")))
    step = saved_steps(workdir / "checkpoints")[-1]
    print(
        f"{kills} kills: {starting} before the first step, {saving} while a checkpoint was written; the last is of step {step}"
    )
    assert step > kills
    home.run(workdir, *length, timeout=3600)
    assert_same_run(workdir, alone)


def test_who_is_gone_is_counted_in_beats_of_one_s_own():
    judge = Judge(["a", "b", "c"])
    assert judge.verdict({0: "0", 1: "0"}) is None  # c has not begun
    for beat in range(1, MISSED_BEATS):
        assert judge.verdict({0: str(beat), 1: str(beat)}) is None
    assert judge.verdict({0: "x", 1: "x"}) == "process 2 (c) is gone"

    judge = Judge(["a", "b"])
    for beat in range(3 * MISSED_BEATS):
        assert judge.verdict({0: str(beat), 1: "ended"}) is None
    for beat in range(LEAVING_BEATS):
        assert judge.verdict({0: str(beat), 1: "failed: no space"}) is None
    assert judge.verdict({0: "x", 1: "failed: no space"}) == "process 1 (b) failed: no space"
