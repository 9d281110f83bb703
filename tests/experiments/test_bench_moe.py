"""`experiments.bench moe`."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench
from experiments.benches import moe, report
from experiments.errors import UserError
from kernels_pallas import expert_mlp

dispatch = importlib.import_module("mdl.moe.dispatch")
HERE = pathlib.Path(__file__).parent
SMALL = HERE / "configs" / "small.py"
TINY = ["--hidden_size=16", "--moe_intermediate_size=8", "--seq_len=8"]
DENSE = [f"--config={SMALL}", "--config.model.moe=none"]
DENSE += ["--config.loss.aux_loss_alpha=none", "--config.loss.bias_update_speed=none"]
PASSES = {"forward", "forward and backward"}


def run(tmp_path, *argv):
    out = tmp_path / "result.json"
    bench.main(["moe", *argv, f"--out={out}", "--repeats=1"])
    result = json.loads(out.read_text())
    assert result["bench"] == "moe"
    return result["results"]


@pytest.mark.slow
def test_routings_products_and_transports(tmp_path):
    results = run(tmp_path, *TINY)
    rows = {(row["routing"], row["experts"], row["pass"]): row for row in results["layers"]}
    cases = {("real", "ours"), ("forced balance", "ours"), ("real", "ragged_dot")}
    assert set(rows) == {(*case, name) for case in cases for name in PASSES} and len(rows) == len(results["layers"])
    for (routing, experts, name), row in rows.items():
        assert row["tokens"] == 64 and row["tokens_per_second"] == pytest.approx(64e3 / row["ms"])
        assert row["busiest_over_mean"] == 1 if routing == "forced balance" else row["busiest_over_mean"] > 1
        assert row["times_ragged_dot"] == pytest.approx(rows["real", "ragged_dot", name]["ms"] / row["ms"])
        assert row["times_real"] == pytest.approx(rows["real", experts, name]["ms"] / row["ms"])

    transports = results["transports"]
    assert {(row["transport"], row.get("pass")) for row in transports} == {
        *((transport, name) for transport in ("Ring", "AllToAll", "EmulatedRagged") for name in PASSES),
        ("RaggedAllToAll", None),
    }
    for row in transports:
        if row["transport"] == "RaggedAllToAll":
            assert "does not run on cpu" in row["unsupported"]
            continue
        assert row["mesh"] == {"data": 1, "expert": 8} and row["choices_dropped"] == 0 and row["times_ring"] > 0
        assert row["rows_moved"] == 8 * 64 if row["transport"] == "Ring" else row["rows_moved"] < 8 * 64


ACCUMULATED = [f"--config={SMALL}", "--config.train.batch_size=16", "--config.train.grad_accum_steps=2"]


def test_a_config_has_its_layer_and_its_train_step_measured(tmp_path, monkeypatch):
    """The rival may fail, and says so."""
    rates = {False: 40.0, True: 50.0}  # by forced balance

    def measure(config, repeats, limit):
        assert (repeats, limit) == (1, 7)
        if dispatch.expert_mlp is moe.ragged_dot_experts:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much\nof everything")
        return {"tokens_per_second": rates[config.model.moe.router.forced_balance], "mfu": 0.5, "peak_memory_bytes": 1}

    monkeypatch.setattr(moe.step, "measure", measure)
    results = run(tmp_path, *ACCUMULATED, "--limit_seconds=7")
    assert {(row["tokens"], row["n_routed_experts"]) for row in results["layers"]} == {(16, 4)}
    assert ["8 devices share neither 4 experts nor 1 rows" in row["unsupported"] for row in results["transports"]] == [
        True
    ]
    assert results["train_step"] == {
        "real": {"tokens_per_second": 40.0, "mfu": 0.5, "of_real": 1.0},
        "forced balance": {"tokens_per_second": 50.0, "mfu": 0.5, "of_real": 1.25},
        "real, ragged_dot": {"failed": "RESOURCE_EXHAUSTED: too much"},
    }


@pytest.mark.slow
def test_train_steps(tmp_path):
    steps = run(tmp_path, *ACCUMULATED)["train_step"]
    assert list(steps) == ["real", "forced balance", "real, ragged_dot"]
    for row in steps.values():
        assert row["tokens_per_second"] > 0 and row["mfu"] > 0
        assert row["of_real"] == pytest.approx(row["tokens_per_second"] / steps["real"]["tokens_per_second"])


def test_products_are_those_named():
    """What was traced under one name is not taken for another."""
    (layer,) = moe.LayerFlags(hidden_size=(16,), moe_intermediate_size=(8,), batch=2, seq_len=4).layers
    init, forward, _ = moe.functions(layer)
    *arguments, _ = init()

    assert "ragged_dot" not in str(jax.make_jaxpr(forward)(*arguments))
    with moe.products_by(moe.ragged_dot_experts):
        assert "ragged_dot" in str(jax.make_jaxpr(forward)(*arguments))
    assert "ragged_dot" not in str(jax.make_jaxpr(forward)(*arguments))


def test_kernels_are_measured_where_there_are_any(monkeypatch):
    """As if this were a GPU: the kernel's own refusal of float32 shows that the layer got there."""
    flags = moe.LayerFlags(
        hidden_size=(16,), moe_intermediate_size=(8,), batch=2, seq_len=4, repeats=1, ragged_dot=False
    )
    assert moe.others(flags) == {}
    monkeypatch.setattr(moe.jax, "default_backend", lambda: "gpu")
    others = moe.others(flags)
    monkeypatch.undo()
    monkeypatch.setattr(moe, "others", lambda flags: others)
    monkeypatch.setattr(moe, "ROUTINGS", ())
    failed = next(iter(moe.measure_products(flags.layers[0], flags)))
    assert failed["experts"] == "kernels" and "gpu takes bfloat16 or float16" in failed["failed"]


def test_a_layer_is_measured_without_a_rival_that_fails(monkeypatch):
    def fail(*arrays, expected_choices):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much")

    monkeypatch.setattr(moe, "ragged_dot_experts", fail)
    flags = moe.LayerFlags(hidden_size=(16,), moe_intermediate_size=(8,), batch=2, seq_len=4, repeats=1)
    failed, *rows = moe.measure_products(flags.layers[0], flags)
    assert (failed["experts"], failed["failed"]) == ("ragged_dot", "RESOURCE_EXHAUSTED: too much")
    assert len(rows) == 4 and {row["times_ragged_dot"] for row in rows} == {None}


def test_the_rival_computes_the_same():
    """Some choices are of absent experts. Float32 sums of some ten terms in another order."""
    rng = np.random.default_rng(0)
    index_TX = jnp.asarray(np.stack([rng.permutation(6)[:2] - 1 for _ in range(40)]))
    shapes = [(40, 6), (40, 2), (4, 6, 5), (4, 6, 5), (4, 5, 6)]
    x, weight, gate, up, down = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    def value_and_gradients(experts):
        def op(x, weight, gate, up, down):
            y_TD = experts(x, index_TX, weight, gate, up, down)
            return jnp.sum(y_TD * x), y_TD

        return jax.jit(jax.value_and_grad(op, argnums=range(5), has_aux=True))(x, weight, gate, up, down)

    both = (jax.tree.leaves(value_and_gradients(experts)) for experts in (moe.ragged_dot_experts, expert_mlp))
    for got, want in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(jnp.abs(want).max()))


def test_a_limit_of_time_ends_the_repetitions():
    calls = []
    assert len(report.seconds(lambda: calls.append(0), 9, warmups=0, limit=1e-9)) == len(calls) == 1
    times = report.interleaved_seconds({"a": lambda: calls.append(1)}, 9, warmups=0, limit=1e-9)
    assert len(calls) == 2 and times["a"] >= 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--hidden_size=16,32", "--moe_intermediate_size=8"], "must have as many values"),
        (["--batch=0"], "--batch=0 must be at least 1"),
        (["--n_group=3"], "n_group=3 must divide n_routed_experts=16"),
        (["--num_experts_per_tok=20"], "num_experts_per_tok=20 must be between 1 and n_routed_experts=16"),
        (["--moe_intermediate_size=0,8"], "moe_intermediate_size is 0"),
        (["--dtype=float16"], "--dtype"),
        (["--limit_seconds=0"], "--limit_seconds=0.0 must be positive"),
        (["--repeats=0"], "--repeats=0 must be at least 1"),
        ([f"--config={SMALL}", "--hidden_size=16"], "--hidden_size"),
        (DENSE, "model.moe is none"),
    ],
)
def test_bad_flags_are_refused(flags, line):
    with pytest.raises(UserError, match=line):
        bench.main(["moe", *flags])


def test_bad_flags_exit_with_2():
    command = [sys.executable, "-m", "experiments.bench", "moe", "--topk_group=5"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: topk_group=5 must be between 1 and n_group=4\n"
