"""Real processes: kill -9 while saving, a disk that fills up, two hosts that write what one reads. Also the workers."""

import itertools
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from checkpoint_states import JSON, abstract_state, assert_same, fill, make_mesh

from experiments.checkpoint import CheckpointConfig, Checkpointer, saved_steps
from experiments.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT_SECONDS = 120


def start(*args):
    """This file as a process: `worker_<name>(*args)`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, *map(str, args)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(*processes):
    """Waits for all of them and returns their stderr; kills all when one hangs."""
    try:
        return [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def worker_save_forever(directory):
    mesh = make_mesh(1, 2, 2, 2)
    abstract = abstract_state(mesh, width=1024)
    with Checkpointer(directory, CheckpointConfig(every=1)) as checkpointer:
        restored = checkpointer.restore_latest(abstract)
        for step in itertools.count(1 if restored is None else restored.step + 1):
            checkpointer.save(step, fill(abstract, step), **JSON | {"data_state": {"next_row": 8 * step}})
            print(step, flush=True)


def kill_and_check(directory, kills):
    abstract = abstract_state(make_mesh(1, 2, 1, 2), width=1024)
    reached, unfinished = 0, 0
    for kill in range(kills):
        process = start("save_forever", directory)
        try:
            first = process.stdout.readline()
            assert first, process.stderr.read()
            time.sleep(random.Random(kill).uniform(0.1, 0.8))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        unfinished += any("tmp" in path.name for path in directory.iterdir())
        with Checkpointer(directory, CheckpointConfig(every=1)) as checkpointer:
            restored = checkpointer.restore_latest(abstract)
        assert restored.step >= max(reached, int(first) - 1) and restored.step > 0
        assert restored.data_state == {"next_row": 8 * restored.step}
        assert_same(restored.state, fill(abstract, restored.step))
        assert not [path.name for path in directory.iterdir() if "tmp" in path.name or "damaged" in path.name]
        reached = restored.step
    return unfinished


def test_kill_9(tmp_path):
    kill_and_check(tmp_path, 3)


@pytest.mark.slow
def test_kill_9_often(tmp_path):
    assert kill_and_check(tmp_path, 20) >= 5  # else the kills miss the saves


def worker_full_disk(directory):
    abstract = abstract_state(make_mesh(1, 2, 2, 2), width=1024)
    warnings = []
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(directory, CheckpointConfig(every=10, keep_last=1), warn=warnings.append) as checkpointer:
        assert checkpointer.save(10, fill(abstract, 10), **JSON)
        checkpointer.check(wait=True)
        for step, limit in [(20, 50_000), (30, 10)]:  # the arrays do not fit; nothing does
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, no_limit[1]))
            checkpointer.save(step, fill(abstract, step), **JSON)
            checkpointer.check(wait=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
            line = warnings.pop()
            assert f"step {step} could not be written" in line and "the last good one is step 10" in line, line
            assert "File too large" in line and "\n" not in line and not warnings, line
            assert checkpointer.latest_step() == 10
        assert_same(checkpointer.restore_latest(abstract).state, fill(abstract, 10))
        assert checkpointer.save(40, fill(abstract, 40), **JSON), warnings  # space again
    assert saved_steps(directory) == [40] and not warnings
    try:
        with Checkpointer(directory, CheckpointConfig(every=10), warn=warnings.append) as checkpointer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, no_limit[1]))
            checkpointer.save(50, fill(abstract, 50), **JSON)
    except UserError as error:
        assert str(error) == warnings.pop() and "last good one is step 40" in str(error)
    else:
        raise AssertionError("leaving the block hid the failed save")


def test_a_full_disk_is_reported_and_keeps_the_last_good_step(tmp_path):
    process = start("full_disk", tmp_path)
    errors = finish(process)
    assert process.returncode == 0, errors
    assert errors == [""]  # all that Orbax had to say is in the one line
    assert saved_steps(tmp_path) == [40]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step_40"]


def worker_host(directory, port, process):
    directory = pathlib.Path(directory)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    abstract = abstract_state(make_mesh(1, 2, 2, 2))
    with Checkpointer(directory / "one", CheckpointConfig()) as checkpointer:
        assert_same(checkpointer.restore_latest(abstract).state, fill(abstract, 5))
    with Checkpointer(directory / "two", CheckpointConfig(every=10)) as checkpointer:
        assert checkpointer.save(10, fill(abstract, 10), **JSON)
        assert checkpointer.save(20, fill(abstract, 20), **JSON | {"data_state": {"host": process}})
        assert checkpointer.save(30, fill(abstract, 30), **JSON)
    if process == "0":
        for path in (directory / "two" / "step_30" / "state").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:100])
    with Checkpointer(directory / "two", CheckpointConfig(every=10)) as checkpointer:
        restored = checkpointer.restore_latest(abstract)
        assert restored.step == 20 and restored.data_state == {"host": process}
        assert_same(restored.state, fill(abstract, 20))
        assert checkpointer.save(30, fill(abstract, 31), **JSON)


def test_two_hosts_of_four_devices_write_and_one_of_any_number_reads(tmp_path):
    abstract = abstract_state(make_mesh(1, 2, 2, 2))
    with Checkpointer(tmp_path / "one", CheckpointConfig()) as checkpointer:
        checkpointer.save(5, fill(abstract, 5), **JSON, force=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [start("host", tmp_path, port, process) for process in range(2)]
    errors = finish(*hosts)
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(errors)
    lines = [line for text in errors for line in text.splitlines() if not line.startswith("[Gloo]")]
    assert len(lines) == 1 and "step 30 is damaged" in lines[0], lines
    with Checkpointer(tmp_path / "two", CheckpointConfig()) as checkpointer:
        for shape in [(1, 2, 2, 2), (2, 2, 1, 1), (1, 1, 1, 1)]:
            abstract = abstract_state(make_mesh(*shape))
            for step, seed in [(10, 10), (30, 31)]:
                restored = checkpointer.restore(step, abstract)
                assert restored.data_state == JSON["data_state"]
                assert_same(restored.state, fill(abstract, seed))
        with pytest.raises(UserError, match="data position for each of 2 processes, this run has 1"):
            checkpointer.restore(20, abstract)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4 if sys.argv[1] == "host" else 8)
    globals()[f"worker_{sys.argv[1]}"](*sys.argv[2:])
