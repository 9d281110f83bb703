"""Runs that begin with the parameters of a model that exists: a Hugging Face directory, a run, a step of a run."""

import dataclasses
import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_runs import CONFIG, ROOT, assert_same_run, checkpoint, copy, metrics

from experiments import cli, convert, init_from, run
from experiments.cli import load_config
from experiments.config import ExperimentConfig
from experiments.init_from import find_source
from experiments.loading import LoadedModel, ModelSource, find_model
from experiments.scoring import score
from experiments.tokenizer import HfTokenizerConfig, Tokenizer, load_tokenizer
from mdl.attention.dsa import DsaConfig
from mdl.hf.safetensors import open_tensors
from mdl.precision import PrecisionConfig
from mdl.pure import PureModel
from mdl.sharding import MeshConfig
from mdl.transformer import TransformerConfig

GOLDEN = ROOT / "tests" / "golden"
FINETUNE = ROOT / "configs" / "finetune.py"
TINY = (
    "--config.train.seq_len=16",
    "--config.train.batch_size=8",
    "--config.model.remat=none",
    "--config.log.every=1",
    "--config.log.tensorboard=false",
    "--config.eval.sample_prompt=none",
)
RESTS = "--config.optim.learning_rate=1e-30"  # every update rounds to nothing


def bytes_only() -> Tokenizer:
    """256 tokens, as many as the golden models have."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return Tokenizer(raw, bos=None, eos=None, chat_template="{{ messages[0].content }}\n")


def with_tokenizer(variant: str, directory: pathlib.Path) -> pathlib.Path:
    shutil.copytree(GOLDEN / variant, directory)
    bytes_only().save(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_tokenizer("deepseek_v3_mtp", tmp_path_factory.mktemp("model") / "hf")


def corpus_flags(home) -> list[str]:
    return [
        "--config.data.source=TextFilesConfig",
        f"--config.data.source.paths={home.corpus}",
        "--config.data.source.validation_fraction=0.2",
    ]


@pytest.fixture
def finetune(home, monkeypatch):
    """Trains in this process, on its eight devices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.cache))

    def finetune(source, workdir, *arguments) -> pathlib.Path:
        flags = [f"--config={FINETUNE}:{source}", f"--workdir={workdir}", *TINY, *corpus_flags(home), *arguments]
        assert run.main(flags) == 0
        return workdir

    return finetune


@pytest.fixture(scope="module")
def resting(model, home, tmp_path_factory):
    """A run of one step that changes nothing, on eight devices; to be read only."""
    workdir = tmp_path_factory.mktemp("resting") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home.cache))
        flags = [f"--config={FINETUNE}:{model}", f"--workdir={workdir}", *TINY, *corpus_flags(home)]
        assert run.main([*flags, RESTS, "--config.train.num_steps=1", "--config.train.ema_decay=0.5"]) == 0
    return workdir


# ---- what a run begins with


def test_a_run_begins_with_the_numbers_of_the_directory(model, resting):
    with np.load(model / "golden.npz") as golden:
        ids, want = golden["input_ids"], golden["logits"]
    got = score(find_model(resting).load(), ids, 8)
    np.testing.assert_allclose(got.logits_BTV, want, rtol=1e-4, atol=1e-4)

    arrays, meta = checkpoint(resting)
    tensors = open_tensors(model)
    np.testing.assert_array_equal(arrays["/params/embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        arrays["/params/layers/1/mlp/experts/gate_EDF"][3], tensors["model.layers.1.mlp.experts.3.gate_proj.weight"].T
    )
    np.testing.assert_array_equal(
        arrays["/buffers/layers/1/mlp/router/bias"], tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    )
    assert [name for name in arrays if name.startswith("/params/mtp/")]
    averages = [name for name in arrays if name.startswith("/ema/")]
    assert len(averages) == sum(name.startswith("/params/") for name in arrays)
    for name in averages:
        np.testing.assert_array_equal(arrays[name], arrays[name.replace("/ema/", "/params/")])
    assert meta["config"]["init_from"] == str(model)
    assert load_tokenizer(resting / "tokenizer").chat_template == "{{ messages[0].content }}\n"


def test_and_back_to_hugging_face(model, resting, tmp_path):
    back = tmp_path / "hf"
    assert convert.main([f"--from={resting}", f"--to={back}"]) == 0
    tensors, expected = open_tensors(back), open_tensors(model)
    assert set(tensors) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(tensors[name], expected[name], err_msg=name)
    assert find_model(back).config.attention == find_model(model).config.attention
    tokenizer = load_tokenizer(back)
    assert tokenizer.chat_template == load_tokenizer(model).chat_template
    assert tokenizer.fingerprint == load_tokenizer(model).fingerprint


def test_the_first_evaluation_is_the_score_of_the_directory(model, resting, home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.cache))
    flags = [f"--config={FINETUNE}:{model}", "--workdir=none", *TINY, *corpus_flags(home)]
    config, _ = cli.parse_argv(flags, run.RunFlags, ExperimentConfig)
    rows = config.data.build(config.train.seq_len, config.seed).validation_rows()
    documents = [
        row["tokens"][row["segment_ids"] == segment] for row in rows for segment in set(row["segment_ids"]) - {0}
    ]
    padded = np.stack(
        [np.pad(tokens, (0, 17 - len(tokens))) for tokens in documents]
    )  # what follows changes nothing before
    logprobs = score(find_model(model).load(), padded, 64).logprobs_BT
    logprobs = np.concatenate([row[: len(tokens) - 1] for row, tokens in zip(logprobs, documents, strict=True)])
    assert len(logprobs) > 500
    assert metrics(resting)[-1]["val/loss"] == pytest.approx(-np.mean(logprobs, dtype=np.float64), rel=1e-5)


def test_any_mesh_holds_the_same_numbers(model):
    config = load_config(f"{FINETUNE}:{model}", ExperimentConfig)
    source, pure = find_source(config), PureModel(config.model)
    assert source is not None
    one = source.load_arrays(pure, MeshConfig(data=1).build(jax.devices()[:1]))
    for mesh in (MeshConfig(data=1, fsdp=8), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)):
        split = source.load_arrays(pure, mesh.build())
        shards = split["params"]["stack"]["mlp"]["experts"]["gate_EDF"].addressable_shards
        assert len({str(shard.index) for shard in shards}) == 8
        jax.tree.map(np.testing.assert_array_equal, split, one)


@pytest.mark.slow
def test_one_device_begins_as_eight_do(model, resting, home, tmp_path):
    ended = home.run(
        tmp_path / "one",
        *(f"--config={FINETUNE}:{model}", *TINY, *corpus_flags(home)),
        *(RESTS, "--config.train.num_steps=1", "--config.train.ema_decay=0.5"),
    )
    assert f"the run begins with the parameters of {model}" in ended.stdout
    (arrays, _), (expected, _) = checkpoint(tmp_path / "one"), checkpoint(resting)
    for name in expected:
        if not name.startswith("/opt/"):
            assert arrays[name].tobytes() == expected[name].tobytes(), name
    line, other = metrics(tmp_path / "one")[0], metrics(resting)[0]
    for name in ("loss", "loss/main", "loss/mtp_1", "val/loss", "grad_norm"):
        np.testing.assert_allclose(line[name], other[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_as_if_nothing_had_happened(finetune, tmp_path):
    source = with_tokenizer("qwen3_untied", tmp_path / "hf")
    steps = ("--config.train.num_steps=6", "--config.checkpoint.every=3", "--config.optim.learning_rate=1e-3")
    workdir = finetune(source, tmp_path / "run", *steps)
    assert metrics(workdir)[-1]["loss"] < metrics(workdir)[0]["loss"]
    resumed = copy(workdir, tmp_path / "resumed", keep=[3])
    (source / "model.safetensors").unlink()  # nothing is read from it any more
    assert_same_run(finetune(source, resumed, *steps), workdir)


def test_from_a_step_of_a_run_in_another_dtype(resting):
    step = resting / "checkpoints" / "step_1"
    config = load_config(f"{FINETUNE}:{step}", ExperimentConfig)
    assert config.data.tokenizer == HfTokenizerConfig(path=str(resting / "tokenizer"))
    precision = PrecisionConfig(param="bfloat16")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
    source, mesh = find_source(config), MeshConfig(data=2, fsdp=2, expert=2).build()
    assert source is not None
    arrays = source.load_arrays(PureModel(config.model), mesh)
    embedding_VD = arrays["params"]["embedding"]
    assert embedding_VD.dtype == jax.numpy.bfloat16 and embedding_VD.sharding.spec == P("tensor", "fsdp")
    np.testing.assert_array_equal(embedding_VD, checkpoint(resting)[0]["/params/embedding"].astype(jax.numpy.bfloat16))
    assert arrays["buffers"]["stack"]["mlp"]["router"]["bias"].dtype == np.float32


def test_from_fp8_weights(tmp_path):
    """Rounded to bfloat16, as the golden model holds them, and computed in float32 they give its logits."""
    directory = with_tokenizer("deepseek_v3_fp8", tmp_path / "hf")
    config = load_config(f"{FINETUNE}:{directory}", ExperimentConfig)
    assert (config.model.precision.param, config.model.precision.compute) == ("float32", "bfloat16")
    precision = PrecisionConfig(param="bfloat16", compute="float32")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
    source, mesh, pure = find_source(config), MeshConfig(data=2, fsdp=2, expert=2).build(), PureModel(config.model)
    assert source is not None
    with np.load(directory / "golden.npz") as golden:
        loaded = LoadedModel(config.model, mesh, source.load_arrays(pure, mesh), pure, None)
        logits = score(loaded, golden["input_ids"], 8).logits_BTV
        np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-4)


def test_from_a_converted_directory_that_kept_its_fp8(tmp_path):
    directory, converted = with_tokenizer("deepseek_v3_fp8", tmp_path / "hf"), tmp_path / "ours"
    assert convert.main([f"--from={directory}", f"--to={converted}", "--dtype=keep"]) == 0
    config = load_config(f"{FINETUNE}:{converted}", ExperimentConfig)
    assert config.data.tokenizer == HfTokenizerConfig(path=str(converted / "tokenizer"))
    mesh, pure = MeshConfig(data=1, fsdp=4, expert=2).build(), PureModel(config.model)
    ours, theirs = (
        source.load_arrays(pure, mesh) for source in (find_source(config), find_model(directory)) if source is not None
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# ---- sparse attention

DENSE = TransformerConfig(attention=DsaConfig().dense)
MODELS = {
    "dense": DENSE,
    "warmup": dataclasses.replace(DENSE, attention=DsaConfig(warmup=True)),
    "sparse": dataclasses.replace(DENSE, attention=DsaConfig()),
}


@pytest.mark.parametrize(
    ("source", "model", "warns"),
    [
        (None, "sparse", True),
        ("dense", "sparse", True),
        ("warmup", "sparse", False),
        ("sparse", "sparse", False),
        (None, "warmup", False),
        ("dense", "warmup", False),
        (None, "dense", False),
    ],
)
def test_indexers_that_were_never_warmed_up_are_named(source, model, warns, monkeypatch, capsys):
    found = {
        name: ModelSource(config, pathlib.Path(), lambda *_: pytest.fail("no array")) for name, config in MODELS.items()
    }
    monkeypatch.setattr(init_from, "find_model", lambda name, flag: found[name])
    find_source(ExperimentConfig(init_from=source, model=MODELS[model]))
    warning = (
        f"warning: the indexers that choose keys have learnt nothing yet (init_from={source or 'none'}); first train them with "
        "model.attention.warmup=true, and name that run in init_from\n"
    )
    told = "going on with other values than warmup: attention.warmup: true → false\n" if source == "warmup" else ""
    assert capsys.readouterr().err == (warning if warns else told)


# ---- the config


@pytest.mark.parametrize(
    "variant", ["deepseek_v3", "deepseek_v2_lite", "deepseek_v32", "glm_moe_dsa", "qwen3_moe", "qwen3_untied", "llama"]
)
def test_the_config_for_every_family(variant, tmp_path):
    directory = with_tokenizer(variant, tmp_path / "hf")
    config = load_config(f"{FINETUNE}:{directory}", ExperimentConfig)
    config.check_training()
    assert config.init_from == str(directory) and config.model.precision.param == "float32"
    assert config.model.attention == find_model(directory).config.attention
    assert config.optim.weight_decay == 0


# ---- what is refused, before anything is written


@pytest.fixture
def refuse(home, monkeypatch, capsys, tmp_path):
    """Runs the command; returns its one line after checking that it left nothing behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.cache))

    def refuse(*arguments, config, workdir=tmp_path / "run"):
        existed = workdir.exists()
        flags = [f"--config={config}", f"--workdir={workdir}", *TINY, *corpus_flags(home), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["run", *flags])
        with pytest.raises(SystemExit) as exited:
            cli.run_main(run.main)
        printed = capsys.readouterr()
        assert exited.value.code == 2 and printed.out == ""
        line = printed.err.splitlines()[-1]
        assert line.startswith("error: ") and "\n" not in line and len(line) < 600
        assert workdir.exists() == existed
        return line

    return refuse


def test_what_is_no_model(refuse, tmp_path):
    assert "begin with: --config=configs/finetune.py:DIR" in refuse(config=FINETUNE)
    said = refuse(config=f"{FINETUNE}:{tmp_path}/none")
    assert re.search(rf"finetune\.py:\d+: DIR={re.escape(str(tmp_path))}/none: no such directory", said)
    line = refuse(f"--config.init_from={tmp_path}/none", config=CONFIG)
    assert line == f"error: --config.init_from={tmp_path}/none: no such directory"
    assert "no checkpoint here" in refuse(f"--config.init_from={tmp_path}", config=CONFIG)


def test_another_model(refuse, model):
    line = refuse(
        "--config.model.hidden_size=32", "--config.model.attention.v_head_dim=8", config=f"{FINETUNE}:{model}"
    )
    assert "hidden_size: 64 → 32; attention.v_head_dim: 20 → 8" in line and str(model) in line
    line = refuse("--config.model.attention.rope_interleave=false", config=f"{FINETUNE}:{model}")
    assert "rope_interleave: true → false" in line
    line = refuse(f"--config.init_from={model}", config=CONFIG)
    assert "holds another model (" in line and "more); set these fields" in line


def test_prediction_modules(refuse, model, tmp_path):
    without = "--config.model.mtp=none", "--config.loss.mtp_loss_weight=none"
    assert "has 1 multi-token-prediction module" in refuse(*without, config=f"{FINETUNE}:{model}")
    directory = with_tokenizer("deepseek_v3", tmp_path / "hf")
    wants = "--config.model.mtp=MtpConfig", "--config.loss.mtp_loss_weight=PiecewiseConfig"
    line = refuse(*wants, config=f"{FINETUNE}:{directory}")
    assert "has no multi-token-prediction module" in line and "set model.mtp=none and loss.mtp_loss_weight=none" in line


def test_another_tokenizer(refuse, model, tmp_path):
    other = tmp_path / "other"
    bytes_only().save(other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    line = refuse(f"--config.data.tokenizer.path={other}", config=f"{FINETUNE}:{model}")
    assert "has another tokenizer than data.tokenizer gives" in line
    assert f"--config.data.tokenizer=HfTokenizerConfig --config.data.tokenizer.path={model}" in line


def test_damaged_weights(refuse, model, tmp_path):
    for damage, part in [(lambda path: path.unlink(), "safetensors"), (cut, "truncated"), (rename, "left over")]:
        directory = copy(model, tmp_path / part)
        damage(directory / "model.safetensors")
        assert part in refuse(config=f"{FINETUNE}:{directory}")


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def rename(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"model.norm.weight"', b'"model.nurm.weight"'))


def test_a_run_stays_with_the_model_that_it_began_with(refuse, resting, model, tmp_path):
    other = copy(model, tmp_path / "hf")
    line = refuse("--config.train.ema_decay=0.5", RESTS, config=f"{FINETUNE}:{other}", workdir=resting)
    assert f"init_from: {model} → {other}" in line
