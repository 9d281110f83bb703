"""Conversion as real processes: killed, interrupted, several at once, in bounded memory. Also the worker that is killed."""

import errno
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from convert_files import FP8, GOLDEN, ROOT, assert_same_files, contents, convert, start

from experiments.conversion import sources, work
from experiments.conversion.journal import Journal, Workspace
from experiments.conversion.sources import read_exactly
from experiments.convert import main
from experiments.errors import UserError

TIMEOUT_SECONDS = 120
# What Python tells its audit hooks about when files change.
EVENTS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}
WAYS = {
    "to ours": (FP8, []),
    "to bfloat16": (FP8, ["--dtype=bf16", "--max_shard_bytes=100000"]),
}


def worker(number, at, *arguments):
    """Converts, sends itself signal `number` at the `at`-th change of the files, and prints how many there were."""
    seen, lock = 0, threading.Lock()
    to = next(a.removeprefix("--to=") for a in arguments if a.startswith("--to="))

    def hook(event, args):
        nonlocal seen
        if event in EVENTS and str(args[0]).startswith(to):
            with lock:
                seen += 1
                if seen == int(at):
                    os.kill(os.getpid(), int(number))

    sys.addaudithook(hook)
    code = main(list(arguments))
    print(f"changes: {seen}")
    return code


def run_worker(number, at, source, to, *arguments):
    """(exit code, stdout, stderr) of a worker."""
    command = [sys.executable, __file__, number, at, f"--from={source}", f"--to={to}", *arguments]
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    return done.returncode, done.stdout, done.stderr


def kill_and_compare(way, kills, tmp_path, seed):
    source, arguments = WAYS[way]
    want = tmp_path / "want"
    code, stdout, stderr = run_worker(0, 0, source, want, *arguments)
    assert code == 0, stderr
    changes = int(re.findall(r"changes: (\d+)", stdout)[0])
    assert changes > 50 or way != "to ours"
    random_at, to, killed, went_on = random.Random(seed), tmp_path / "to", 0, 0
    while killed < kills:
        at = random_at.randint(1, max(2, changes // 3))
        code, stdout, stderr = run_worker(int(signal.SIGKILL), at, source, to, *arguments)
        went_on += "going on" in stdout
        if code == 0:  # too late for this signal: begin again
            assert_same_files(to, want)
            to = tmp_path / f"to_{killed}"
            continue
        assert code == -signal.SIGKILL, stderr
        killed += 1
    if not to.exists():
        assert main([f"--from={source}", f"--to={to}", *arguments]) == 0
    assert_same_files(to, want)
    assert not to.with_name("to.converting").exists()
    return went_on


def test_kill_9(tmp_path):
    assert kill_and_compare("to ours", 3, tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_kill_9_often(way, tmp_path):
    assert kill_and_compare(way, 20, tmp_path, seed=1) > 5  # else the kills miss the work


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_cleanly_and_the_same_command_goes_on(number, code, tmp_path):
    to = tmp_path / "to"
    arguments = ["--dtype=bf16", "--max_shard_bytes=100000"]
    got, stdout, stderr = run_worker(int(number), 20, FP8, to, *arguments)
    assert (got, stderr) == (code, "interrupted; the same command goes on from here\n"), stdout
    assert not to.exists()
    convert(FP8, to, dtype="bf16", max_shard_bytes=100_000)
    assert_same_files(to, convert(FP8, tmp_path / "want", dtype="bf16", max_shard_bytes=100_000))


def test_two_processes_share_the_work(tmp_path):
    to = tmp_path / "to"
    processes = [start(FP8, to, num_processes=2, process_id=i) for i in range(2)]
    ended = [process.communicate(timeout=TIMEOUT_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    sizes = [json.loads(out.splitlines()[-1])["bytes"] for out, _ in ended]
    assert min(sizes) > 0.3 * sum(sizes)
    want = convert(FP8, tmp_path / "want")
    assert sum(sizes) == sum(
        file.stat().st_size for file in want.glob("checkpoints/step_0/state/*/*") if not file.name.startswith(".")
    )
    assert_same_files(to, want)
    assert not list(tmp_path.glob("*.converting"))


# ---- what is kept between attempts, in this process


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A conversion that stopped when all units were there and the rest was not."""

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "finishing", stop)
        assert main([f"--from={GOLDEN / 'llama'}", f"--to={tmp_path / 'to'}"]) == 130
    return tmp_path / "to"


def test_what_is_written_is_not_written_again(begun, capsys):
    files = begun.with_name("to.converting") / "result"
    before = {path: path.stat().st_mtime_ns for path in files.rglob("0*")}
    capsys.readouterr()
    convert(GOLDEN / "llama", begun)
    output = capsys.readouterr().out
    assert "going on: 575 kB of 575 kB are there" in output and '"bytes": 0,' in output
    assert {begun / path.relative_to(files): time for path, time in before.items()} == {
        path: path.stat().st_mtime_ns for path in begun.rglob("0*")
    }


def test_another_request_does_not_go_on_with_it(begun):
    with pytest.raises(
        UserError, match=r"holds the unfinished work of another request .differs in dtype, files to write"
    ):
        main([f"--from={GOLDEN / 'llama'}", f"--to={begun}", "--dtype=bf16"])
    assert not begun.exists()


@pytest.mark.parametrize("flags", [{}, {"dtype": "bf16", "to_format": "hf"}])
def test_bytes_that_read_back_changed_are_noticed_and_written_again(flags, tmp_path, monkeypatch):
    arguments = [f"--from={GOLDEN / 'llama'}", f"--to={tmp_path / 'to'}", *(f"--{k}={v}" for k, v in flags.items())]

    def read_badly(descriptor, content, offset, file):
        read_exactly(descriptor, content, offset, file)
        if "to.converting" in str(file):
            content[100] ^= 4

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_exactly", read_badly)
        with pytest.raises(UserError, match=r"reads back changed.*the same command writes it again"):
            main(arguments)
    assert not (tmp_path / "to").exists()
    convert(GOLDEN / "llama", tmp_path / "to", **flags)
    assert_same_files(tmp_path / "to", convert(GOLDEN / "llama", tmp_path / "want", **flags))


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(tmp_path, monkeypatch):
    arguments = [f"--from={FP8}", f"--to={tmp_path / 'to'}", "--dtype=bf16", "--max_shard_bytes=100000"]
    with monkeypatch.context() as patch:
        pwrite, calls = os.pwrite, iter(range(60))

        def full(*args):
            if next(calls, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(*args)

        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"No space left on device; when that is mended, the same command goes on"):
            main(arguments)
    assert main(arguments) == 0
    assert_same_files(tmp_path / "to", convert(FP8, tmp_path / "want", dtype="bf16", max_shard_bytes=100_000))


def test_a_process_works_alone_on_its_share(begun):
    with Journal(Workspace(begun), 0), pytest.raises(UserError, match="another process is at this work"):
        main([f"--from={GOLDEN / 'llama'}", f"--to={begun}"])
    convert(GOLDEN / "llama", begun)


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    source, carry_out = tmp_path / "source", work.carry_out
    source.mkdir()
    for name, content in contents(GOLDEN / "llama").items():
        (source / name).write_bytes(content)

    def carry_out_and_touch(*args):
        carry_out(*args)
        os.utime(source / "model.safetensors", (0, 0))

    monkeypatch.setattr(work, "carry_out", carry_out_and_touch)
    with pytest.raises(UserError, match="its files were changed meanwhile"):
        main([f"--from={source}", f"--to={tmp_path / 'to'}"])
    assert not (tmp_path / "to").exists()


def test_killed_between_the_last_rename_and_tidying_up(tmp_path, capsys):
    to = convert(GOLDEN / "llama", tmp_path / "to")
    (tmp_path / "to.converting").mkdir()
    assert main([f"--from={GOLDEN / 'llama'}", f"--to={to}"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert not (tmp_path / "to.converting").exists()


# ---- memory


def test_pieces_under_way_hold_no_more_memory_than_allowed():
    held, most, lock, done = 0, 0, threading.Lock(), []

    def piece(size):
        nonlocal held, most
        with lock:
            held += size
            most = max(most, held)
        threading.Event().wait(0.001)
        with lock:
            held -= size
            done.append(size)

    sizes = [*np.random.default_rng(0).integers(1, 60, 100).tolist(), 500]
    with work._Pool(100) as pool:
        for size in sizes:
            pool.submit(size, lambda size=size: piece(size))
    assert sorted(done) == sorted(sizes)
    assert most == 500  # a piece that needs more goes alone

    with pytest.raises(OSError, match="disk"), work._Pool(100) as pool:
        for size in sizes:
            pool.submit(size, lambda: (_ for _ in ()).throw(OSError("disk")))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["to ours", "to float32", "to fp8", "back"])
def test_memory_stays_small_whatever_the_size(way, tmp_path):
    source = tmp_path / "source"
    largest, total = llama_of_zeros(source)
    bound = 3 * largest + 1_000_000_000
    assert total > bound
    flags = {"to float32": {"dtype": "f32", "to_format": "hf"}, "to fp8": {"fp8": "true"}}.get(way, {})
    if way == "back":
        source = convert(source, tmp_path / "ours")
    process = start(source, tmp_path / "to", **flags)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["peak_memory_bytes"] <= bound


def llama_of_zeros(directory: pathlib.Path) -> tuple[int, int]:
    """A bfloat16 checkpoint with matrices of 64 MiB that takes no space on disk; bytes of the largest tensor and of all."""
    directory.mkdir()
    D, F, V, L = 4096, 8192, 8192, 6
    config = {"model_type": "llama", "hidden_size": D, "intermediate_size": F, "vocab_size": V, "num_hidden_layers": L,
              "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
              "rope_theta": 1e4, "torch_dtype": "bfloat16", "tie_word_embeddings": False}  # fmt: skip
    shapes = {"model.embed_tokens.weight": [V, D], "lm_head.weight": [V, D], "model.norm.weight": [D]}
    for i in range(L):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{p}_proj.weight": [D, D] for p in "qkvo"}
        shapes |= {f"{layer}mlp.{p}_proj.weight": [F, D] for p in ("gate", "up")} | {
            f"{layer}mlp.down_proj.weight": [D, F]
        }
        shapes |= {f"{layer}{norm}_layernorm.weight": [D] for norm in ("input", "post_attention")}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return 2 * F * D, end


if __name__ == "__main__":
    sys.exit(worker(*sys.argv[1:]))
