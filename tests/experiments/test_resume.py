"""A run that is stopped, killed or robbed of its newest checkpoint ends as one that nothing happened to, bit for bit."""

import json
import random
import signal
import time

from small_runs import assert_same_run, copy, metrics, newest


def test_signals_save_and_the_same_command_goes_on(home, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    step = 0
    for number, code in [(signal.SIGTERM, 143), (signal.SIGINT, 130)]:
        with home.start(workdir) as run:
            run.wait_for_step(step + 3)
            run.signal(number)
            ended = run.end()
        assert ended.code == code, ended.stdout + ended.stderr
        assert f"{number.name}: saving after this step" in ended.stderr and "Traceback" not in ended.stderr
        lines = metrics(workdir)
        assert step + 3 <= len(lines) < 40
        if step:
            assert f"resumed from the checkpoint of step {step}" in ended.stdout
        step = len(lines)
        assert f"stopped at step {step} and saved" in ended.stdout.splitlines()[-1]
        assert newest(workdir).name == f"step_{step}"
    ended = home.run(workdir)
    assert f"resumed from the checkpoint of step {step}" in ended.stdout
    assert_same_run(workdir, uninterrupted)


def test_a_second_signal_leaves_at_once(home, uninterrupted, tmp_path):
    workdir = copy(uninterrupted, tmp_path / "run", keep=[20])
    with home.start(workdir, "--config.train.num_steps=400", "--config.checkpoint.every=1000") as run:
        run.wait_for_step(23)
        time.sleep(1)  # by now it waits for its full stdout to be read: it cannot save
        run.signal(signal.SIGTERM)
        assert "train.num_steps: 40 → 400; checkpoint.every: 10 → 1000" in run.wait_for_error_line()
        assert "once more to leave at once" in run.wait_for_error_line()
        run.signal(signal.SIGTERM)
        assert run.process.wait(timeout=20) == 143
    assert newest(workdir).name == "step_20"


def test_ctrl_c_before_the_first_step_shows_no_traceback(home, tmp_path):
    with home.start(tmp_path / "run") as run:
        run.wait_for("^model: ")
        run.signal(signal.SIGINT)
        ended = run.end()
    assert ended.code == 130 and "Traceback" not in ended.stderr, ended.stderr


def test_kill_9(home, uninterrupted, tmp_path):
    """A hundred times: test_faults.py."""
    workdir = tmp_path / "run"
    for step in (7, 31):
        with home.start(workdir) as run:
            run.wait_for_step(step)
            time.sleep(random.Random(step).uniform(0, 0.05))
            run.signal(signal.SIGKILL)
            assert run.end().code == -signal.SIGKILL
    assert "resumed from the checkpoint" in home.run(workdir).stdout
    assert_same_run(workdir, uninterrupted)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(home, uninterrupted, tmp_path):
    workdir = copy(uninterrupted, tmp_path / "run")
    # Of the merged database: what a process wrote on the way there may be large and read by nobody.
    largest = max((newest(workdir) / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # as a killed process leaves it
    kernels = "--config.model.kernels.flash_attention=pallas"  # there is none for CPUs
    ended = home.run(workdir, "--config.log.every=5", "--config.data.num_threads=1", kernels)
    assert "warning: the checkpoint of step 40 is damaged" in ended.stderr and "falling back to step 30" in ended.stderr
    assert "log.every: 1 → 5" in ended.stderr and "data.num_threads: 2 → 1" in ended.stderr
    assert "resumed from the checkpoint of step 30" in ended.stdout
    assert_same_run(workdir, uninterrupted)
    assert json.loads((workdir / "config.json").read_text())["log"]["every"] == 5


def test_a_run_that_is_done_says_so(home, uninterrupted, tmp_path):
    workdir = copy(uninterrupted, tmp_path / "run")
    ended = home.run(workdir)
    assert "has all of its 40 steps; raise train.num_steps to go on" in ended.stdout
    assert_same_run(workdir, uninterrupted)
