"""The benches run and report what they promise; how fast anything is, no test can say."""

import json
import pathlib

import numpy as np
import pytest

from experiments import bench
from experiments.benches.experts import group_sizes
from experiments.errors import UserError

SMALL = str(pathlib.Path(__file__).parent / "configs" / "small.py")


def run(tmp_path, *argv):
    out = tmp_path / "result.json"
    bench.main([*argv, f"--out={out}", "--repeats=1"])
    result = json.loads(out.read_text())
    assert result["bench"] == argv[0] and result["versions"]["jax"] and result["device"]["kind"] == "cpu"
    return result["results"]


def test_step(tmp_path):
    results = run(
        tmp_path, "step", f"--config={SMALL}", "--config.train.batch_size=16", "--config.train.grad_accum_steps=2"
    )
    assert results["tokens_per_second"] > 0 and 0 < results["mfu"] < 2 and results["compile_seconds"] > 0
    assert results["peak_memory_bytes"] > 1e6
    assert results["batch"]["rows"] == 16


def test_experts(tmp_path):
    results = run(tmp_path, "experts", "--rows=64", "--hidden_size=8", "--intermediate_size=8", "--experts=4")
    assert [(row["experts"], row["loads"]) for row in results] == [(4, "equal"), (4, "routed"), (4, "skewed")]
    assert all(row["forward_share_of_dense"] > 0 for row in results)


@pytest.mark.parametrize("loads", ["equal", "routed", "skewed"])
def test_loads_are_whole_and_as_named(loads):
    sizes = group_sizes(8192, 16, loads)
    assert sizes.sum() == 8192
    busiest = sizes.max() * 16 / 8192
    low, high = {"equal": (1.0, 1.01), "routed": (1.3, 2.2), "skewed": (3.9, 4.1)}[loads]
    assert low <= busiest <= high
    assert np.all(sizes >= 0)


def test_an_unknown_bench_is_refused():
    with pytest.raises(UserError, match="did you mean step"):
        bench.main(["stpe"])
