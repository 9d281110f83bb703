"""Bad input to the training command: one line that names the field, the value and the fix, exit code 2, nothing written."""

import json
import pathlib
import resource
import subprocess
import sys

import pytest
from small_runs import CONFIG, ROOT, copy, newest

from experiments import cli, run


@pytest.fixture
def refuse(home, monkeypatch, capsys, tmp_path):
    """Runs the command in this process; returns its one line after checking that it left nothing behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.cache))

    def refuse(*arguments, config=f"{CONFIG}:{home.corpus}", workdir=tmp_path / "run", said=()):
        before = snapshot(workdir)
        monkeypatch.setattr(sys, "argv", ["run", f"--config={config}", f"--workdir={workdir}", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.run_main(run.main)
        printed = capsys.readouterr()
        assert exited.value.code == 2
        *others, line = printed.err.splitlines()
        assert line.startswith("error: ") and len(line) < 500, printed.err
        assert all(any(text in other for text in said) for other in others), printed.err
        assert printed.out == ""
        assert snapshot(workdir) == before
        return line

    return refuse


def snapshot(workdir):
    if not workdir.is_dir():
        return workdir.exists()
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in workdir.rglob("*")}


ONLY_CONFIG = {
    "misspelt key": (["--config.train.num_stpes=5"], "num_stpes", "did you mean num_steps?"),
    "misspelt part": (["--config.trian.num_steps=5"], "trian", "did you mean train?"),
    "mistyped value": (["--config.train.num_steps=ten"], "--config.train.num_steps=ten", "expected int"),
    "mistyped boolean": (["--config.model.scan_layers=yes"], "scan_layers=yes", "true or false"),
    "not finite": (["--config.optim.learning_rate=nan"], "learning_rate=nan", "expected float"),
    "field of another member": (["--config.model.attention.num_key_value_heads=1"], "GqaConfig has it", "switch with"),
    "negative steps": (["--config.train.num_steps=-5"], "num_steps=-5", "at least 1"),
    "zero batch": (["--config.train.batch_size=0"], "batch_size=0", "at least 1"),
    "zero sequence": (["--config.train.seq_len=0"], "seq_len=0", "at least 1"),
    "negative seed": (["--config.seed=-1"], "seed=-1", "negative"),
    "uneven accumulation": (["--config.train.grad_accum_steps=3"], "grad_accum_steps=3", "batch_size=8"),
    "uneven ramp": (
        ["--config.train.batch_ramp=BatchRampConfig", "--config.train.batch_ramp.start_batch_size=3"],
        "start_batch_size=3",
        "multiple of the micro-batch",
    ),
    "stray argument": (["tiny"], "stray argument 'tiny'", ""),
    "unknown flag": (["--workdri=x"], "--workdri", "did you mean --workdir?"),
    "field without config.": (["--train.num_steps=5"], "--train.num_steps", "did you mean --config.train.num_steps?"),
    "flag without value": (["--config.seed"], "--config.seed", "needs a value"),
    "half of a cluster": (["--num_processes=2"], "--coordinator_address", "all three"),
    "topk_group above n_group": (["--config.model.moe.router.topk_group=3"], "topk_group", "n_group"),
    "more chosen than there are": (["--config.model.moe.router.num_experts_per_tok=5"], "num_experts_per_tok", ""),
    "no room for tokens": (
        ["--config.model.moe.transport=AllToAllConfig", "--config.model.moe.transport.capacity_factor=0"],
        "capacity_factor=0.0 must be positive",
        "none makes room for all",
    ),
    "lambda without MTP": (["--config.model.mtp=none"], "mtp_loss_weight", "loss.mtp_loss_weight=none"),
    "MTP without lambda": (["--config.loss.mtp_loss_weight=none"], "model.mtp", "model.mtp=none"),
    "MTP with lambda 0": (["--config.loss.mtp_loss_weight.values=0"], "mtp_loss_weight", "none switches it off"),
    "balance without experts": (["--config.model.moe=none"], "aux_loss_alpha", "loss.aux_loss_alpha=none"),
    "bias without router bias": (
        ["--config.model.moe.router.topk_method=greedy", "--config.model.moe.router.n_group=1"],
        "bias_update_speed",
        "none",
    ),
    "groups that limit nothing": (["--config.model.moe.router.topk_method=greedy"], "n_group=2", "set n_group=1"),
    "every key selected": (
        ["--config.model.attention=DsaConfig", "--config.model.attention.index_topk=16"],
        "model.attention.index_topk=16 selects every key of train.seq_len=16",
        "set it below",
    ),
    "an indexer without its loss": (
        ["--config.model.attention=DsaConfig", "--config.model.attention.index_topk=8"],
        "loss.indexer_loss_weight is none",
        "set it (to 1)",
    ),
    "an indexer's loss without one": (
        ["--config.loss.indexer_loss_weight=1"],
        "loss.indexer_loss_weight is set but model.attention has no indexer",
        "model.attention=DsaConfig",
    ),
    "no query latent to score by": (
        ["--config.model.attention=DsaConfig", "--config.model.attention.dense.q_lora_rank=none"],
        "dense.q_lora_rank is none",
        "set its width",
    ),
    "nothing to train": (["--config.train.trainable="], "trainable=() trains nothing", "none trains every parameter"),
    "sequence beyond positions": (
        ["--config.train.seq_len=65"],
        "train.seq_len=65",
        "model.max_position_embeddings=64",
    ),
    "negative weight": (["--config.loss.z_loss_weight=-1"], "z_loss_weight=-1", "none switches it off"),
    "two open axes": (["--config.mesh.fsdp=none"], "mesh axis", "at most one"),
    "checkpoints never": (["--config.checkpoint.every=0"], "every=0", "at least 1"),
    "evaluations never": (["--config.eval.every=0"], "every=0", "at least 1"),
}


@pytest.mark.parametrize("name", ONLY_CONFIG)
def test_what_the_config_alone_shows(name, refuse, monkeypatch):
    arguments, *parts = ONLY_CONFIG[name]
    monkeypatch.setattr("jax.devices", None)  # no device is looked for
    monkeypatch.setattr("jax.device_count", None)
    line = refuse(*arguments)
    assert all(part in line for part in parts), line


ON_EIGHT_DEVICES = {
    "batch": (["--config.train.batch_size=12"], "=12 is not divisible by mesh data x fsdp x expert=8"),
    "micro-batch": (["--config.train.grad_accum_steps=2"], "=4 is not divisible by mesh data x fsdp x expert=8"),
    "evaluation batch": (["--config.eval.batch_size=4"], "eval.batch_size=4 is not divisible"),
    "experts": (["--config.mesh.expert=8"], "model.moe.router.n_routed_experts=4 is not divisible by mesh expert=8"),
    "heads": (["--config.mesh.tensor=4"], "model.attention heads=2 is not divisible by mesh tensor=4"),
    "transport": (
        ["--config.mesh.expert=2", "--config.model.moe.transport=RaggedAllToAllConfig"],
        "RaggedAllToAllConfig does not run on cpu; RingConfig, AllToAllConfig, EmulatedRaggedConfig do",
    ),
    "groups": (
        [
            f"--config.{x}"
            for x in ("mesh.expert=2", "model.moe.router.n_routed_experts=12", "model.moe.router.n_group=3")
        ],
        "model.moe.router.n_group=3 does not fit mesh expert=2",
    ),
    "devices": (["--config.mesh.fsdp=3"], "does not fit 8 devices"),
    "schedule": (["--config.optim.schedule.warmup_steps=50"], "optim.schedule.warmup_steps=50"),
    "schedule parts": (
        ["--config.optim.schedule.warmup_fraction=0.5", "--config.optim.schedule.decay_fraction=0.6"],
        "do not fit into num_steps=40",
    ),
}


@pytest.mark.parametrize("name", ON_EIGHT_DEVICES)
def test_what_does_not_fit_the_devices_or_the_run(name, refuse):
    arguments, part = ON_EIGHT_DEVICES[name]
    assert part in refuse(*arguments)


def test_config_files(refuse, tmp_path):
    assert "no such config file (did you mean configs/tiny.py?)" in refuse(config="configs/tinny.py")
    (tmp_path / "empty.py").write_text("")
    assert "does not define get_config" in refuse(config=tmp_path / "empty.py")
    (tmp_path / "bad.py").write_text(
        "from experiments.config import *\ndef get_config():\n    return TrainConfig(steps=3)\n"
    )
    assert "bad.py:3" in (line := refuse(config=tmp_path / "bad.py")) and "steps" in line


def test_corpora(refuse, tmp_path):
    def text(name, content):
        (tmp_path / name).write_bytes(content)
        return f"{CONFIG}:{tmp_path / name}"

    def jsonl(name, content):
        (tmp_path / name).write_bytes(content)
        return "--config.data.source=JsonlConfig", f"--config.data.source.paths={tmp_path / name}"

    assert "no such file" in refuse(config=f"{CONFIG}:{tmp_path}/missing/*.txt")
    assert "the corpus is empty" in refuse(config=text("empty.txt", b""))
    line = refuse(config=text("latin.txt", "füße".encode("latin-1")))
    assert "latin.txt: byte 1 is not UTF-8" in line and "skip_bad_files" in line
    line = refuse(*jsonl("torn.jsonl", b'{"text": "good"}\n{"text": "to\n'))
    assert "torn.jsonl:2: " in line and "skip_bad_lines" in line
    assert "no field 'text' (data.source.text_field)" in refuse(*jsonl("other.jsonl", b'{"body": "good"}\n'))
    assert "no document is held out" in refuse(config=text("one.txt", b"all in one document"))
    line = refuse(
        "--config.data.source=TfdsConfig", f"--config.data.source.data_dir={tmp_path}", "--config.data.source.name=wiki"
    )
    assert "wiki" in line


def test_tokenizers(refuse, home, uninterrupted, tmp_path):
    line = refuse("--config.model.vocab_size=200")
    assert "model.vocab_size=200 is smaller than the tokenizer's" in line
    path = tmp_path / "tokenizer.json"
    assert str(path) in refuse("--config.data.tokenizer=HfTokenizerConfig", f"--config.data.tokenizer.path={path}")
    path.write_text("{}")
    assert str(path) in refuse("--config.data.tokenizer=HfTokenizerConfig", f"--config.data.tokenizer.path={path}")

    # A tokenizer that is trained on the corpus, which then changes.
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for file in pathlib.Path(home.corpus).parent.iterdir():
        (corpus / file.name).write_bytes(file.read_bytes())
    bpe = ["--config.data.tokenizer=BpeTokenizerConfig", "--config.data.tokenizer.vocab_size=300"]
    for trained in ("of the directory", "of the checkpoints"):
        workdir = copy(uninterrupted, tmp_path / trained)
        config = json.loads((workdir / "config.json").read_text())
        config["data"]["source"]["paths"] = [str(corpus / "*.txt")]
        config["data"]["tokenizer"] = {"class": "BpeTokenizerConfig", "vocab_size": 300}
        (workdir / "config.json").write_text(json.dumps(config))
        if trained == "of the checkpoints":
            for file in (workdir / "tokenizer").iterdir():
                file.unlink()
            (workdir / "tokenizer").rmdir()
        line = refuse(*bpe, config=f"{CONFIG}:{corpus}/*.txt", workdir=workdir, said=["tokenizer", "data: "])
        assert "tokenizer" in line and "--workdir" in line and str(workdir) in line


def test_directories(refuse, home, uninterrupted, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert f"--workdir={file}: is a file" in refuse(workdir=file)
    assert f"--workdir={file}/run: cannot be written" in refuse(workdir=file / "run", said=["data: "])
    line = refuse("--config.model.hidden_size=32", workdir=uninterrupted)
    assert "holds a run of another config (model.hidden_size: 16 → 32)" in line and "another directory" in line
    assert "seed: 0 → 1" in refuse("--config.seed=1", workdir=uninterrupted)
    assert "train.ema_decay: none → 0.9" in refuse("--config.train.ema_decay=0.9", workdir=uninterrupted)
    line = refuse("--config.optim.moment_dtype=bfloat16", workdir=uninterrupted)
    assert "optim.moment_dtype: float32 → bfloat16" in line
    elsewhere = f"--config.checkpoint.directory={uninterrupted}/checkpoints"
    assert (
        f"error: checkpoint.directory={uninterrupted}/checkpoints holds a run of another config (seed: 0 → 1)"
        in refuse(elsewhere, "--config.seed=1")
    )
    copied = copy(uninterrupted, tmp_path / "copied", keep=[])
    line = refuse(f"--config.checkpoint.directory={file}/c", workdir=copied, said=["going on with other values"])
    assert f"error: {file}/c: checkpoints cannot be written (Not a directory); choose another directory" in line
    broken = copy(uninterrupted, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert "config.json: not a readable config" in refuse(workdir=broken)
    assert "cannot write" in refuse(f"--config.data.cache_dir={file}")


def command(*arguments):
    """The command as a process: (exit code, stdout, stderr, processor seconds)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


def test_the_command_itself_is_quick_and_starts_no_device(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "a_platform_that_does_not_exist")  # looking for a device would fail
    workdir = f"--workdir={tmp_path / 'run'}"
    for arguments, part in [
        (["--config=configs/tiny.py", "--config.train.num_stpes=5", workdir], "did you mean num_steps?"),
        (["--config=configs/tiny.py", "--config.train.seq_len=1e6", workdir], "train.seq_len=1000000"),
        ([workdir], "no config: give --config=FILE.py, such as configs/"),
        (["--config=configs/tiny.py"], "--workdir is required"),
    ]:
        code, stdout, stderr, seconds = command(*arguments)
        assert (code, stdout) == (2, "")
        assert stderr.count("\n") == 1 and stderr.startswith("error: ") and part in stderr
        assert seconds < 3  # of its own: others may share the cores
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_and_keeps_the_last_good_step(home, uninterrupted, tmp_path):
    workdir = copy(uninterrupted, tmp_path / "run", keep=[20])
    with home.start(workdir, limit_file_size=60_000) as started:
        ended = started.end()
    assert ended.code == 2, ended.stderr
    assert "resumed from the checkpoint of step 20" in ended.stdout
    *others, line = ended.stderr.splitlines()
    assert line.startswith("error: ") and "the checkpoint of step 40 could not be written" in line
    assert "File too large" in line and "the last good one is step 20" in line
    assert any("the checkpoint of step 30 could not be written" in other for other in others)
    assert newest(workdir).name == "step_20" and "Traceback" not in ended.stderr
