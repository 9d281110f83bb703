"""Corpus and checkpoints in gs://: Orbax, TensorStore and gcsfs with a store on this machine that answers as Google's does."""

import dataclasses
import glob
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from small_runs import ROOT, assert_same_run, metrics

pytest.importorskip("gcsfs", reason="needs gcsfs, of the extra dev")


@pytest.fixture
def store(tmp_path):
    """Variables with which gs://bucket lies below tmp_path / "store"."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, pathlib.Path(__file__).with_name("google_store.py"), str(port), tmp_path / "store"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as client:
            if not client.connect_ex(("localhost", port)):
                break
        time.sleep(0.1)
    url = f"http://localhost:{port}"
    yield {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # or it asks Google for the kind of each bucket
    }
    server.kill()
    server.wait()


@pytest.mark.slow
def test_a_killed_run_goes_on_from_a_bucket(home, store, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    put = "import gcsfs, sys; gcsfs.GCSFileSystem().put(sys.argv[1:], 'bucket/corpus/')"
    subprocess.run([sys.executable, "-c", put, *glob.glob(home.corpus)], env=os.environ | store, check=True)
    home = dataclasses.replace(home, corpus="gs://bucket/corpus/*.txt")
    directory = "--config.checkpoint.directory=gs://bucket/runs/one"
    with home.start(workdir, directory, variables=store) as run:
        run.wait_for_step(25)
        run.signal(signal.SIGKILL)
        assert run.end().code == -signal.SIGKILL
    ended = home.run(workdir, directory, variables=store)
    assert re.search(r"^resumed from the checkpoint of step (10|20)$", ended.stdout, re.MULTILINE), ended.stdout
    assert len(metrics(workdir)) == 40 and not (workdir / "checkpoints").exists()
    (workdir / "checkpoints").symlink_to(tmp_path / "store" / ".cloudstorage" / "bucket" / "runs" / "one")
    assert_same_run(workdir, uninterrupted)

    (workdir / "checkpoints").unlink()  # the run's own config says where they are
    generate = [
        sys.executable,
        "-m",
        "experiments.generate",
        "--prompt_ids=1,2,3",
        "--max_new_tokens=4",
        "--temperature=0",
    ]
    text, ids = [
        subprocess.run(
            [*generate, f"--checkpoint={checkpoint}"],
            cwd=ROOT,
            env=os.environ | store,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for checkpoint in (workdir, "gs://bucket/runs/one")
    ]
    assert bytes(map(int, ids.split())).decode() == text.removesuffix("\n") != ""  # the tokenizer stays with the run
