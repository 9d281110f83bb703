"""The table of what compilers say: its rows, its JSON, and what it says when there are no compilers."""

import json

import pytest

from experiments import bench
from experiments.benches.aot import HEADER, line
from experiments.errors import UserError
from kernels_pallas import aot

needs_compilers = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))


@needs_compilers
def test_one_op_on_one_chip(tmp_path, capsys):
    out = tmp_path / "result.json"
    bench.main(["aot", "--chip=h200", "--op=fp8.dequantize of weights", f"--out={out}"])
    results = json.loads(out.read_text())["results"]
    assert {(row["op"], row["implementation"], row["chip"]) for row in results} == {
        ("fp8.dequantize of weights", "gpu", "h200")
    }
    for row in results:
        assert row["compiled"] and row["error"] is None and row["vmem_bytes"] is None
        assert row["registers"] > 32 and row["spill_bytes"] == 0 and row["shared_memory_bytes"] > 128 * 128 * 3
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert printed.err.splitlines() == [HEADER, *map(line, results)]


def test_a_row_says_why_something_does_not_compile():
    about = {"op": "an op", "shape": "[3]", "implementation": "tpu", "chip": "v5e", "seconds": 0.5}
    figures = ("registers", "spill_bytes", "shared_memory_bytes", "vmem_bytes", "temp_bytes", "bundles")
    row = line({**about, **dict.fromkeys(figures), "compiled": False, "error": "ValueError: no"})
    assert row.split() == ["an", "op", "[3]", "tpu", "v5e", "no", "0.50", "ValueError:", "no"]


def test_without_compilers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(aot, "unavailable", lambda: "libtpu not installed: pip install 'mdl[aot]'")
    with pytest.raises(UserError, match="libtpu not installed"):
        bench.main(["aot"])
    assert capsys.readouterr() == ("", "")


def test_unknown_chips_and_ops_are_refused(monkeypatch):
    monkeypatch.setattr(aot, "unavailable", lambda: None)
    with pytest.raises(UserError, match="did you mean v6e"):
        bench.main(["aot", "--chip=v6"])
    with pytest.raises(UserError, match=r"--op=fp9 --contains= leave no case; the ops are .*fp8\.quantize_activations"):
        bench.main(["aot", "--op=fp9"])
