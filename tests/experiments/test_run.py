"""What one training command does and leaves behind, beside resuming."""

import json
import math
import shutil

import numpy as np
import pytest
from small_runs import CONFIG, DENSE, ROOT, Home, assert_close_run, checkpoint, metrics, newest

from experiments import run
from experiments.config import ExperimentConfig
from experiments.config_tree import from_json, to_json
from experiments.errors import UserError
from experiments.tokenizer import load_tokenizer
from mdl.pure import PureModel

CONFIG_FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if not path.name.startswith("_"))


def in_process(home: Home, monkeypatch, workdir, *arguments) -> int:
    """The command on the eight devices of the test process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.cache))
    return run.main([f"--config={CONFIG}:{home.corpus}", f"--workdir={workdir}", *arguments])


def test_a_whole_run(uninterrupted):
    lines = metrics(uninterrupted)
    assert len(lines) == 40
    first, last = lines[0], lines[-1]
    assert math.log(256) < first["loss/main"] < math.log(320) + 0.2  # a fresh model guesses
    assert last["val/loss"] < 2.5 < first["loss/main"]
    for line in lines:
        total = line["loss/main"] + 0.3 * line["loss/mtp_1"] + 1e-4 * line["loss/balance"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert line["loss/balance"] > 0 and 0 < line["load/entropy"] <= 1 + 1e-6 and line["skipped_steps"] == 0
    assert {line["step"] for line in lines if "val/bpb" in line} == {20, 40}
    assert last["load/bias_norm"] > 0
    printed = (uninterrupted / "stdout").read_text()
    assert f"val bpb {last['val/bpb']:.4f}" in printed and "step 40/40" in printed
    assert "flash_attention: implementation xla" in printed
    config = from_json(ExperimentConfig, json.loads((uninterrupted / "config.json").read_text()))
    assert config.train.num_steps == 40 and config.model.hidden_size == 16
    tokenizer = load_tokenizer(uninterrupted / "tokenizer")
    _, meta = checkpoint(uninterrupted)
    assert meta["extra"]["tokenizer_sha256"] == tokenizer.fingerprint
    assert from_json(ExperimentConfig, meta["config"]) == config
    assert (uninterrupted / "loss.png").stat().st_size > 1000


def test_times_of_steps_are_those_of_steps(uninterrupted):
    """Steps at which the run evaluates and saves take as long as the others."""
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    times = {line["step"]: line["step_ms"] for line in lines[1:]}
    usual = np.median(list(times.values()))
    assert all(times[step] > usual / 10 for step in (10, 20, 30, 40)), times
    assert all(0 <= line["data_wait"] <= 1 for line in lines)


@pytest.mark.slow  # test_step.py has accumulation
def test_accumulation_averages_and_traces_change_no_loss(home, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    options = ("--config.train.grad_accum_steps=2", "--config.train.ema_decay=0.5", "--config.eval.batch_size=16")
    ended = home.run(workdir, *options, "--config.train.profile_steps=3:4")
    assert_close_run_with_ema(workdir, uninterrupted)
    assert "profiler trace written to" in ended.stdout and list((workdir / "profile").rglob("*.xplane.pb"))

    before = snapshot(workdir)
    evaluated = home.run(workdir, *options, "--eval_only")
    last = metrics(workdir)[-1]
    assert "evaluating the checkpoint of step 40" in evaluated.stdout
    for name in ("val/loss", "val/bpb", "val/ema_loss", "val/ema_bpb"):
        assert f"{name} {last[name]:.4f}" in evaluated.stdout
    assert snapshot(workdir) == before


def assert_close_run_with_ema(workdir, uninterrupted):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert ("val/ema_bpb" in line) == (line["step"] in (20, 40))
    assert lines[-1]["val/ema_bpb"] != lines[-1]["val/bpb"]
    assert lines[-1]["val/ema_bpb"] == pytest.approx(lines[-1]["val/bpb"], rel=0.1)
    assert_close_run(workdir, uninterrupted, ignore=("val/ema_loss", "val/ema_bpb", "val/ema_acceptance/mtp_1"))


def snapshot(workdir):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in workdir.rglob("*")}


def test_the_batch_grows_in_whole_micro_batches(home, monkeypatch, tmp_path):
    workdir = tmp_path / "run"
    ramp = "BatchRampConfig", "start_batch_size=8", f"tokens={24 * 16}"
    code = in_process(
        home,
        monkeypatch,
        workdir,
        *DENSE,
        "--config.train.num_steps=5",
        "--config.train.batch_size=16",
        "--config.train.grad_accum_steps=2",
        f"--config.train.batch_ramp={ramp[0]}",
        *(f"--config.train.batch_ramp.{field}" for field in ramp[1:]),
        "--config.train.ema_decay=0.75",
        "--config.checkpoint.every=1",
    )
    assert code == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    tokens = [round(line["tokens_per_second"] * line["step_ms"] / 1000) for line in lines]
    assert [count // 16 for count in tokens] == [8, 8, 8, 16, 16]  # it grows once 24 rows have been seen
    arrays, meta = checkpoint(workdir)
    assert meta["data_states"] == [{"index": sum(tokens) // 16}]

    shutil.rmtree(newest(workdir))
    earlier, _ = checkpoint(workdir)
    averages = [name for name in arrays if name.startswith("/ema/")]
    assert len(averages) == sum(name.startswith("/params/") for name in arrays) > 5
    for name in averages:
        expected = 0.75 * earlier[name] + 0.25 * arrays[name.replace("/ema/", "/params/")]
        np.testing.assert_allclose(arrays[name], expected, rtol=1e-5, atol=1e-8)


def test_steps_that_are_not_finite_are_skipped_counted_and_stop_the_run(home, monkeypatch, tmp_path):
    arguments = ("--config.optim.learning_rate=1e30", "--config.optim.clip_norm=none", "--config.checkpoint.every=2")
    with pytest.raises(UserError) as stopped:
        in_process(home, monkeypatch, tmp_path / "run", *DENSE, *arguments, "--config.train.max_skipped_steps=3")
    lines = metrics(tmp_path / "run")
    skipped = [line["skipped_steps"] for line in lines]
    first = skipped.index(1)
    assert skipped[first:] == [1, 2, 3] and lines[-1]["skipped_in_a_row"] == 3
    assert any(lines[first][name] is None for name in ("loss", "grad_norm"))  # null: JSON has no NaN
    message = str(stopped.value)
    assert "stopped at step" in message and "3 times in a row (train.max_skipped_steps)" in message
    _, meta = checkpoint(tmp_path / "run")
    assert f"the last good checkpoint is of step {meta['step']}" in message
    assert all(np.all(np.isfinite(array)) for array in checkpoint(tmp_path / "run")[0].values())


def test_eval_only_needs_a_checkpoint_and_creates_nothing(home, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no checkpoint to evaluate"):
        in_process(home, monkeypatch, tmp_path / "run", "--eval_only")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_can_be_trained_or_says_why_not_and_written_down(path):
    from experiments.cli import load_config

    arguments = {"finetune": f":{ROOT / 'tests' / 'golden' / 'deepseek_v3'}"}  # of the configs that need one
    config = load_config(f"{path}{arguments.get(path.stem, '')}", ExperimentConfig)
    config.check_training()
    tree = PureModel(config.model).abstract()
    assert tree["params"]
    text = json.dumps(to_json(config))
    assert from_json(ExperimentConfig, json.loads(text)) == config
    assert json.dumps(to_json(from_json(ExperimentConfig, json.loads(text)))) == text
