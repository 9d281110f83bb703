"""`experiments.bench grouped_gemm`."""

import json

import pytest

from experiments import bench
from experiments.benches import grouped_gemm
from experiments.errors import UserError
from kernels_pallas.grouped_gemm.shapes import Shape


def test_every_product_and_load_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(grouped_gemm, "SHAPES", {"tiny": Shape(groups=3, rows=40, inner=16, outer=24)})
    out = tmp_path / "result.json"
    bench.main(["grouped_gemm", f"--out={out}", "--repeats=1", "--dtype=float32"])
    rows = json.loads(out.read_text())["results"]
    products = {"forward", "backward, rows", "backward, weights"}
    wanted = {(product, who) for product in products for who in ("dense", "ragged_dot", "xla")} | {
        ("fp8 forward", "xla")
    }
    for loads in ("equal", "routed", "skewed"):
        mine = [row for row in rows if row["loads"] == loads]
        assert {(row["product"], row["implementation"]) for row in mine} == wanted and len(mine) == len(wanted)
    assert all(row["us"] > 0 and row["share_of_dense"] > 0 for row in rows)
    assert {row["share_of_dense"] for row in rows if row["implementation"] == "dense"} == {1.0}


def test_flags_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="leave no shape"):
        bench.main(["grouped_gemm", "--contains=nothing"])
