"""The benches run and report what they promise; how fast anything is, no test can say."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from small_runs import DENSE

from experiments import bench
from experiments.benches import mla_decode
from experiments.benches.experts import group_sizes
from experiments.errors import UserError
from kernels_pallas.mla_decode.shapes import Shape

SMALL = str(pathlib.Path(__file__).parent / "configs" / "small.py")
ROOT = pathlib.Path(__file__).parents[2]


def run(tmp_path, *argv):
    out = tmp_path / "result.json"
    bench.main([*argv, f"--out={out}", "--repeats=1"])
    result = json.loads(out.read_text())
    assert result["bench"] == argv[0] and result["versions"]["jax"] and result["device"]["kind"] == "cpu"
    return result["results"]


def test_step(tmp_path):
    rows = "--config.train.batch_size=16", "--config.train.grad_accum_steps=2"
    results = run(tmp_path, "step", f"--config={SMALL}", *DENSE, *rows)
    assert results["tokens_per_second"] > 0 and 0 < results["mfu"] < 2 and results["compile_seconds"] > 0
    assert results["peak_memory_bytes"] > 1e6
    assert results["batch"]["rows"] == 16


def test_experts(tmp_path):
    results = run(tmp_path, "experts", "--rows=64", "--hidden_size=8", "--intermediate_size=8", "--experts=4")
    assert [(row["experts"], row["loads"]) for row in results] == [(4, "equal"), (4, "routed"), (4, "skewed")]
    assert all(row["forward_share_of_dense"] > 0 for row in results)


def test_fp8(tmp_path):
    results = run(tmp_path, "fp8", "--max_elements=1200000")
    ops = [(row["op"], row["implementation"], row.get("threads")) for row in results]
    assert ops.count(("quantize_activations", "xla", None)) == ops.count(("dequantize_activations", "xla", None)) == 2
    assert ops[-6:] == [
        ("quantize_weights", "xla", None),
        ("dequantize_weights", "xla", None),
        ("quantize_weights", "host", 1),
        ("dequantize_weights", "host", 1),
        ("quantize_weights", "host", 2),
        ("dequantize_weights", "host", 2),
    ]
    for row in results:
        assert row["us"] > 0 and row["gb_per_second"] > 0 and row["share_of_copy"] > 0
        if row["implementation"] == "xla":
            assert row["times_xla"] == 1
    tokens, width = results[0]["shape"]
    num_bytes = tokens * width * (2 + 1) + tokens * width // 128 * 4  # bfloat16 in, e4m3 and a scale per tile out
    assert results[0]["gb_per_second"] == pytest.approx(num_bytes / results[0]["us"] / 1e3)


def test_fp8_without_a_shape_is_refused():
    with pytest.raises(UserError, match="leaves no shape"):
        bench.main(["fp8", "--max_elements=1000"])


def test_benches_load_no_data_pipeline():
    """They run on machines that have no data and not all packages."""
    code = "import sys, experiments.bench; print(sorted({'grain', 'tensorflow_datasets', 'tensorflow'} & set(sys.modules)))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_flash_attention(tmp_path):
    (row,) = run(tmp_path, "flash_attention", "--contains=tiny")
    assert row["shape"] == "tiny train" and row["declined"] == {}
    assert row["xla"]["forward_gflops"] > 0 and row["xla"]["backward_tokens_per_second"] > 0
    with pytest.raises(UserError, match="leave no shape"):
        bench.main(["flash_attention", "--contains=nothing"])


@pytest.mark.parametrize("loads", ["equal", "routed", "skewed"])
def test_loads_are_whole_and_as_named(loads):
    sizes = group_sizes(8192, 16, loads)
    assert sizes.sum() == 8192
    busiest = sizes.max() * 16 / 8192
    low, high = {"equal": (1.0, 1.01), "routed": (1.3, 2.2), "skewed": (3.9, 4.1)}[loads]
    assert low <= busiest <= high
    assert np.all(sizes >= 0)


@pytest.mark.slow
def test_decode(tmp_path):
    results = run(tmp_path, "decode", f"--config={SMALL}", "--batch=1,3", "--prompt=4", "--tokens=3")
    assert [row["batch"] for row in results] == [1, 3]
    assert all(row["tokens_per_second"] > 0 and row["cpu_ms_per_token"] > 0 for row in results)


def test_decode_with_drafts(tmp_path):
    flags = [f"--config={SMALL}", "--batch=2", "--prompt=4", "--tokens=4", "--draft=mtp"]
    plain, drafted = run(tmp_path, "decode", *flags)
    assert (plain["draft"], drafted["draft"]) == (None, "mtp") and drafted["speedup"] > 0
    assert len(drafted["acceptance"]) == 1 and 0 <= drafted["acceptance"][0] <= 1
    with pytest.raises(UserError, match="--draft=mtp: the config: the model has no MTP modules"):
        bench.main(["decode", *flags, "--config.model.mtp=none"])


def test_decode_of_nothing_is_refused():
    with pytest.raises(UserError, match="--batch, --prompt and --tokens"):
        bench.main(["decode", f"--config={SMALL}", "--tokens=0"])


def test_mla_decode(tmp_path, monkeypatch):
    tiny = {"tiny": Shape(batch=2, heads=2, length=100, capacity=128), "large": Shape(batch=1, heads=1, length=10**9)}
    monkeypatch.setattr(mla_decode, "SHAPES", tiny)
    rows = run(tmp_path, "mla_decode", "--max_slots=256", "--splits=none,2")
    assert {(row["storage"], row["implementation"], row["splits"]) for row in rows} == {
        ("contiguous", "plain", None),
        *((storage, "xla", splits) for storage in ("contiguous", "paged", "fp8") for splits in (None, 2)),
    }
    assert all(row["shape"] == "tiny" and row["gb_per_second"] > 0 and row["times_plain"] > 0 for row in rows)


def test_an_unknown_bench_is_refused():
    with pytest.raises(UserError, match="did you mean step"):
        bench.main(["stpe"])
