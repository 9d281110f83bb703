"""A run keeps neither memory nor files: what the bench says of runs that would, of a short one, and (slow) of 10,000 steps."""

import json
import os
import subprocess
import sys

import pytest
from small_runs import CONFIG, DENSE, ROOT, TIMEOUT_SECONDS

from experiments import bench
from experiments.benches.memory import Sample, figures, look
from experiments.errors import UserError

# The run of benchmarks/results at a quarter of its width, whose steps take milliseconds, with everything else that a run does now
# and then.
LONG = (
    "--config.model.hidden_size=64",
    "--config.model.mlp.intermediate_size=176",
    "--config.train.num_steps=10000",
    "--config.train.batch_size=1",
    "--config.train.seq_len=16",
    "--config.eval.every=2000",
    "--config.eval.batch_size=256",
    "--config.checkpoint.every=500",
)


def test_what_grows_is_found():
    leaking = [Sample(step, 10**9 + 3000 * step, 30 + step // 100) for step in range(100, 10_001, 100)]
    found = figures(leaking)
    assert found["rss_bytes_per_step"] == pytest.approx(3000) and found["open_files_per_step"] == pytest.approx(
        0.01, rel=0.05
    )
    warming = [Sample(step, 10**9 + 10**6 * min(step, 1500), 30) for step in range(100, 10_001, 100)]
    found = figures(warming)
    assert abs(found["rss_bytes_per_step"]) < 1e-3 and abs(found["open_files_per_step"]) < 1e-9
    coming_and_going = [Sample(step, 10**9 + (300 << 20) * (step % 1000 == 0), 30) for step in range(100, 10_001, 100)]
    assert abs(figures(coming_and_going)["rss_bytes_per_step"]) < 1e-3
    with pytest.raises(UserError, match="samples say nothing"):
        figures(leaking[:3])


def test_this_process_is_seen():
    before = look(1, os.getpid())
    held = bytearray(200 << 20)
    held[::4096] = b"x" * len(held[::4096])
    with open(os.devnull):
        after = look(2, os.getpid())
    assert after.rss_bytes - before.rss_bytes > 150 << 20 and after.open_files == before.open_files + 1


@pytest.mark.slow
def test_a_short_run(home, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.cache))
    out, picture = tmp_path / "result.json", tmp_path / "memory.png"
    run = f"--config={CONFIG}:{home.corpus}", f"--workdir={tmp_path / 'run'}", *DENSE
    bench.main(["memory", *run, "--every=2", f"--out={out}", f"--plot={picture}"])
    results = json.loads(out.read_text())["results"]
    assert results["samples"]["step"][-1] == 40 and len(results["samples"]["step"]) >= 20
    assert 1e8 < results["rss_bytes_settled"]["least"] < 8e9 and results["open_files_settled"]["least"] > 3
    assert picture.stat().st_size < 100_000
    with pytest.raises(UserError, match="ended with exit code 2"):
        bench.main(["memory", *run, "--config.seed=1"])


def test_holes_in_the_heap_are_given_back():
    """200 MiB in pieces, of which the last, at the end of the heap, stays."""
    code = """
import ctypes, os
from experiments.backend import give_memory_back, keep_memory
from experiments.benches.memory import look
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
assert keep_memory()
pieces = [libc.malloc(100_000) for _ in range(2098)]
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
for piece in pieces[:-1]:
    libc.free(piece)
before = look(1, os.getpid()).rss_bytes
give_memory_back()
print(before - look(2, os.getpid()).rss_bytes)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and int(ended.stdout) > 150 << 20, ended.stdout + ended.stderr


def test_a_run_has_one_heap(tmp_path):
    """Threads of their own heaps would be those of JAX, which start with its devices, and those that write checkpoints."""
    code = """
import ctypes, sys, threading
import jax
import experiments.train
def train(config, workdir):
    jax.devices()
    threads = [threading.Thread(target=bytearray, args=[100_000]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    libc = ctypes.CDLL(None)
    libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
    libc.fflush(None)
    return 0
experiments.train.train = train
from experiments.run import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, f"--config={ROOT / 'configs' / 'tiny_dense.py'}", f"--workdir={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert ended.returncode == 0 and ended.stdout.count("<heap nr=") == 1, ended.stdout + ended.stderr


@pytest.mark.slow
def test_ten_thousand_steps_of_tiny_dense(tmp_path):
    """Both stay, but for what TensorStore keeps of every save: 27 KB, 54 bytes a step.

    Memory grew by 80 KiB a step of the full width before checkpoints gave back what they leave, and by 8 KiB a step of this one
    before JAX's threads had one heap. What is left of the bound is for pages that one small object holds.
    """
    out = tmp_path / "result.json"
    config = ROOT / "configs" / "tiny_dense.py"
    bench.main(["memory", f"--config={config}", f"--workdir={tmp_path / 'run'}", *LONG, f"--out={out}"])
    results = json.loads(out.read_text())["results"]
    assert results["samples"]["step"][-1] == 10_000
    assert results["rss_bytes_per_step"] < 1024
    assert results["open_files_per_step"] < 1e-3
