"""The same run on other devices and on several processes: equal to rounding."""

import re
import signal

import pytest
from small_runs import DENSE, assert_close_run, metrics, newest

# What the CPU's collectives print of themselves, torn by their threads.
GLOO = r"\[Gloo\]|Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is|[:\d\s]"


@pytest.mark.slow  # test_faults.py has processes that go on as another number
def test_one_run_on_eight_devices_then_four_then_one(home, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    done = 0
    for devices, mesh in [(8, {"data": 1, "fsdp": 8}), (4, {"data": 1, "fsdp": 2, "expert": 2})]:
        with home.start(
            workdir, *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()), devices=devices
        ) as run:
            run.wait_for_step(done + 4)
            run.signal(signal.SIGTERM)
            ended = run.end()
        assert ended.code == 143, ended.stdout + ended.stderr
        assert f"devices: {devices} cpu" in ended.stdout
        done = len(metrics(workdir))
    ended = home.run(workdir)
    assert f"resumed from the checkpoint of step {done}" in ended.stdout
    assert "mesh.fsdp: 2 → 1" in ended.stderr
    assert_close_run(workdir, uninterrupted)


def test_two_processes_then_one(home, two_processes, tmp_path):
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    home.run(alone, *DENSE)
    first, second = two_processes(workdir, *DENSE, "--config.mesh.fsdp=2")
    first.wait_for_step(5)
    second.signal(signal.SIGTERM)  # the one that prints nothing
    told, silent = first.end(), second.end()
    assert (told.code, silent.code) == (143, 143), told.stderr + silent.stderr
    assert "devices: 8 cpu (data 4 x fsdp 2)" in told.stdout
    done = len(metrics(workdir))
    assert f"stopped at step {done} and saved" in told.stdout and newest(workdir).name == f"step_{done}"
    assert silent.stderr.startswith("SIGTERM: saving after this step") and silent.stderr.count("\n") == 1, silent.stderr
    assert not re.sub(GLOO, "", silent.stdout), silent.stdout

    ended = home.run(workdir, *DENSE, devices=2)
    assert f"resumed from the checkpoint of step {done}" in ended.stdout
    assert_close_run(workdir, alone)
