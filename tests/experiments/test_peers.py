"""Processes of one run that only wait, without devices: what they hear of each other, and how they end."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from experiments import peers
from experiments.cli import run_main
from experiments.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
HOST = socket.gethostname()
TIMEOUT_SECONDS = 120


def worker(port, process, what):
    process = int(process)
    peers.BEAT_SECONDS = 0.5
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)

    def main(argv):
        with peers.Watch(lambda: "step 7 remains"):
            for call in range(12):  # more than nine: numbers are no texts
                assert peers.gather([process, call]) == [[0, call], [1, call]]
            assert peers.of_first({"process": process}) == {"process": 0}
            if what in ("together", "alike"):
                with peers.together():
                    if what == "alike" or process == 1:
                        raise UserError(f"no such file{'' if what == 'alike' else ' here'}")
            print("meets", flush=True)
            if what == "both fail" or what == f"{process} fails":
                time.sleep(0.2 * process)
                raise UserError(f"no space on {process}")
            if "ends" in what and f"{process} ends" != what:
                time.sleep(2 * peers.MISSED_BEATS * peers.BEAT_SECONDS)
            elif "ends" not in what:
                time.sleep(TIMEOUT_SECONDS)

    run_main(main)


@pytest.fixture
def start():
    processes = []

    def start(what):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for process in range(2):
            command = [sys.executable, __file__, str(port), str(process), what]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "a_platform_that_does_not_exist"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=environment, **pipes))
        return processes[-2:]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def end(process):
    """Its exit code and the last line of what it says."""
    _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, (stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize("gone", [0, 1])
def test_one_is_killed(gone, start):
    processes = start("waits")
    for process in processes:
        assert process.stdout.readline() == "meets\n"
    processes[gone].send_signal(signal.SIGKILL)
    assert end(processes[1 - gone]) == (peers.GONE, f"error: process {gone} ({HOST}) is gone; step 7 remains")


@pytest.mark.parametrize("fails", [0, 1])
def test_one_fails(fails, start):
    processes = start(f"{fails} fails")
    assert end(processes[fails]) == (2, f"error: no space on {fails}")
    line = f"error: process {fails} ({HOST}) failed: no space on {fails}; step 7 remains"
    assert end(processes[1 - fails]) == (peers.GONE, line)


def test_each_says_its_own_error_before_that_of_another(start):
    assert [end(process) for process in start("both fail")] == [(2, f"error: no space on {n}") for n in range(2)]


def test_what_fails_in_a_block_together_fails_in_all(start):
    assert [end(process) for process in start("together")] == [(2, f"error: process 1 ({HOST}): no such file here")] * 2
    assert [end(process) for process in start("alike")] == [(2, "error: no such file")] * 2


def test_one_may_end_long_before_another(start):
    assert [end(process) for process in start("1 ends")] == [(0, ""), (0, "")]


def test_one_never_comes():
    code = """
import functools, jax
jax.distributed.initialize = functools.partial(jax.distributed.initialize, initialization_timeout=4)
from experiments.distributed import DistributedFlags, initialize
initialize(DistributedFlags(coordinator_address="localhost:0", num_processes=2, process_id=1))
"""
    with socket.socket() as nobody:
        nobody.bind(("localhost", 0))
        code = code.replace(":0", f":{nobody.getsockname()[1]}")
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == peers.GONE
    assert done.stderr.splitlines()[-1].startswith("error: not all processes of this run have come within 5 minutes; ")


if __name__ == "__main__":
    worker(*sys.argv[1:])
