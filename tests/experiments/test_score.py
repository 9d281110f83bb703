"""`python -m experiments.score`: from files to files, for Hugging Face directories and for runs, and what it refuses."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import score
from experiments.checkpoint import CheckpointConfig
from experiments.config import ExperimentConfig
from experiments.config_tree import to_json
from experiments.errors import UserError
from experiments.loading import load_model
from experiments.tokenizer import byte_tokenizer
from mdl.attention.gqa import GqaConfig
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.mtp import MtpConfig
from mdl.precision import PrecisionConfig
from mdl.pure import PureModel
from mdl.transformer import TransformerConfig

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
LLAMA = GOLDEN / "llama"
FP8 = GOLDEN / "deepseek_v3_fp8"


@pytest.fixture
def run(tmp_path):
    """Scores in this process; returns the arrays."""

    def run(checkpoint, **flags):
        out = tmp_path / "out.npz"
        arguments = {"checkpoint": checkpoint, "out": out} | flags
        assert score.main([f"--{name}={value}" for name, value in arguments.items()]) == 0
        with np.load(out) as arrays:
            return dict(arrays)

    return run


@pytest.fixture
def ids(tmp_path):
    """Saves token ids; returns the file."""

    def save(array):
        np.save(tmp_path / "ids.npy", array)
        return tmp_path / "ids.npy"

    return save


def with_tokenizer(directory: pathlib.Path, *, bos: bool) -> pathlib.Path:
    """The llama golden with a byte tokenizer; its BOS is no id of the 256 that the model knows."""
    shutil.copytree(LLAMA, directory)
    byte_tokenizer().save(directory, add_bos=bos)
    return directory


# ---- what comes out


def test_the_command(tmp_path, ids):
    want = np.load(LLAMA / "golden.npz")
    out = tmp_path / "scores"  # written under exactly this name
    result = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.score", f"--checkpoint={LLAMA}"),
            *(f"--input_ids={ids(want['input_ids'])}", f"--out={out}"),
        ],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert re.match(r"loss 6\.6013\d\d over 2 x 47 predicted tokens; wrote ", result.stdout)
    scores = np.load(out)
    assert scores["logits"].dtype == scores["logprobs"].dtype == np.float32
    np.testing.assert_allclose(scores["logits"], want["logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores["loss"], want["loss"], rtol=1e-5)


def test_log_probabilities_and_loss_follow_from_the_logits(run, ids):
    input_ids = np.random.default_rng(0).integers(0, 256, (3, 9)).astype(np.uint8)
    scores = run(LLAMA, input_ids=ids(input_ids), batch_size=2)
    logits = scores["logits"].astype(np.float64)
    log_softmax = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    want = np.take_along_axis(log_softmax[:, :-1], input_ids[:, 1:, None].astype(np.int64), -1)[..., 0]
    assert scores["logits"].shape == (3, 9, 256)
    np.testing.assert_allclose(scores["logprobs"], want, atol=1e-5)
    np.testing.assert_allclose(scores["loss"], -want.mean(), rtol=1e-6)


def test_batches_do_not_change_the_numbers(run, ids):
    file = ids(np.random.default_rng(1).integers(0, 256, (17, 5)))
    together = run(LLAMA, input_ids=file, batch_size=32)
    apart = run(LLAMA, input_ids=file, batch_size=1)
    np.testing.assert_allclose(apart["logits"], together["logits"], rtol=1e-5, atol=1e-5)


def test_text(run, tmp_path):
    checkpoint = with_tokenizer(tmp_path / "llama", bos=False)
    (tmp_path / "text").write_text("def f(x):\n", encoding="utf-8")
    from_flag = run(checkpoint, text="def f(x):\n")
    from_file = run(checkpoint, text_file=tmp_path / "text")
    assert from_flag["input_ids"].tolist() == [list(b"def f(x):\n")]
    np.testing.assert_array_equal(from_flag["logits"], from_file["logits"])


def test_fp8_weights_score_as_what_they_stand_for(run, ids):
    golden = np.load(FP8 / "golden.npz")
    file = ids(golden["input_ids"])
    logits = run(FP8, input_ids=file)["logits"]
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(logits, run(FP8 / "dequantized_bf16", input_ids=file)["logits"])


def test_computes_in_bfloat16_when_told_to(run, ids):
    golden = np.load(FP8 / "golden.npz")
    logits = run(FP8, input_ids=ids(golden["input_ids"]), compute="bfloat16")["logits"]
    error, peers_error = (np.abs(a - golden["logits"]).mean() for a in (logits, golden["logits_bf16_compute"]))
    assert (
        0.1 * peers_error < error < 2 * peers_error
    )  # no further from float32 than twice the peer, but not in float32 either


# ---- runs of our own

MODEL = TransformerConfig(
    vocab_size=264,
    hidden_size=32,
    num_hidden_layers=2,
    max_position_embeddings=32,
    mlp=MlpConfig(intermediate_size=48),
    moe=MoeConfig(moe_intermediate_size=16, router=RouterConfig(n_routed_experts=4, num_experts_per_tok=2)),
    mtp=MtpConfig(),
    precision=PrecisionConfig(compute="float32"),
)
DENSE = dataclasses.replace(MODEL, attention=GqaConfig(head_dim=8), moe=None, mtp=None, tie_word_embeddings=True)


def save_run(workdir: pathlib.Path, model: TransformerConfig) -> dict:
    """A run directory with two checkpoints and the byte tokenizer; returns the arrays of the second."""
    byte_tokenizer().save(workdir / "tokenizer")
    config_json = to_json(ExperimentConfig(model=model))
    (workdir / "config.json").write_text(json.dumps(config_json))
    arrays, init = {}, jax.jit(PureModel(model).init)
    with CheckpointConfig(every=1).build(workdir / "checkpoints") as checkpointer:
        for step in (1, 2):
            arrays = init(jax.random.key(step))
            checkpointer.save(step, arrays, data_state={}, config_json=config_json, extra={})
    return arrays


@pytest.mark.parametrize("model", [MODEL, DENSE], ids=["moe", "dense"])
def test_scores_a_run(run, tmp_path, model):
    workdir = tmp_path / "run"
    arrays = save_run(workdir, model)
    loaded = load_model(workdir)
    assert loaded.config == loaded.module().config == model
    jax.tree.map(np.testing.assert_array_equal, loaded.arrays, arrays)

    newest = run(workdir, text="x = 1")
    assert newest["input_ids"].tolist() == [[*b"x = 1"]]  # this run was trained without BOS
    first = run(workdir / "checkpoints" / "step_1", text="x = 1")
    assert np.abs(newest["logits"] - first["logits"]).max() > 1e-3


# ---- what is refused, before weights are read


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "experiments.score", f"--checkpoint={tmp_path}/none", "--out=o.npz", "--text=a"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr == f"error: --checkpoint={tmp_path}/none: no such directory\n"


FULL = np.zeros((2, 8), np.int32)
BAD_IDS = {
    "negative": (FULL - 1, "token id -1 is not between 0 and vocab_size - 1 = 255"),
    "beyond the vocabulary": (FULL + 256, "token id 256 is not between"),
    "huge": (FULL.astype(np.uint64) + 2**63, "token id 9223372036854775808 is not between"),
    "floats": (FULL.astype(np.float32), "has dtype float32; token ids are integers"),
    "booleans": (FULL.astype(bool), "has dtype bool"),
    "one row without its axis": (FULL[0], r"has shape \[8\]; \[rows, tokens\] is expected"),
    "no rows": (FULL[:0], r"input of shape \[0, 8\]"),
    "one token": (FULL[:, :1], r"input of shape \[2, 1\]: at least one row of two tokens"),
    "too long": (np.zeros((1, 1025), np.int32), "rows of 1025 tokens are longer than max_position_embeddings=1024"),
    "objects": (np.array([[1, "a"]], object), "not a .npy file of integers"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids(run, ids, tmp_path, case):
    array, message = BAD_IDS[case]
    with pytest.raises(UserError, match=message) as error:
        run(LLAMA, input_ids=ids(array))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.npz").exists()


BAD_FLAGS = {
    "nothing to score": ({}, "give one of --input_ids"),
    "two things to score": ({"text": "a", "input_ids": "ids.npy"}, "give one of --input_ids"),
    "missing ids": ({"input_ids": "none.npy"}, "--input_ids=none.npy: cannot be read"),
    "ids that are no array": ({"input_ids": str(LLAMA / "config.json")}, "not a .npy file"),
    "several arrays": ({"input_ids": str(LLAMA / "golden.npz")}, "holds several arrays"),
    "text without tokenizer": ({"text": "a"}, "holds no tokenizer.json; give --input_ids"),
    "no rows at once": ({"text": "a", "batch_size": 0}, "--batch_size=0: must be at least 1"),
    "unknown flag": ({"texts": "a"}, r"unknown flag --texts \(did you mean --text\?\)"),
    "no place for the result": ({"text": "a", "out": "/none/out.npz"}, "--out=/none/out.npz: the directory"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(run, case):
    flags, message = BAD_FLAGS[case]
    with pytest.raises(UserError, match=message):
        run(LLAMA, **flags)


def test_bad_text(run, tmp_path):
    checkpoint = with_tokenizer(tmp_path / "llama", bos=False)
    with pytest.raises(UserError, match=r"--text_file=.*none: cannot be read"):
        run(checkpoint, text_file=tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"--text_file=.*latin: not UTF-8"):
        run(checkpoint, text_file=tmp_path / "latin")
    with pytest.raises(UserError, match=r"input of shape \[1, 0\]"):
        run(checkpoint, text="")
    with pytest.raises(UserError, match="token id 256 is not between"):
        run(with_tokenizer(tmp_path / "with_bos", bos=True), text="abc")


def test_bad_checkpoints(run, ids, tmp_path):
    file = ids(FULL)
    directory = tmp_path / "model"
    directory.mkdir()
    with pytest.raises(UserError, match="no checkpoint here"):
        run(directory, input_ids=file)
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        run(directory, input_ids=file)
    config = json.loads((LLAMA / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(UserError, match="attention_bias=true: only false is supported"):
        run(directory, input_ids=file)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor"):
        run(directory, input_ids=file)
    (directory / "model.safetensors").write_bytes((LLAMA / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match="the file is truncated"):
        run(directory, input_ids=file)
