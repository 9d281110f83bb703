"""The bench of sparse attention: what it reports, draws and refuses; and 128K tokens through DeepSeek-V3.2's in 16 GB."""

import json
import pathlib

import pytest

from experiments import bench
from experiments.benches import dsa
from experiments.errors import UserError
from kernels_pallas import aot

CONFIGS = pathlib.Path(__file__).parent / "configs"
SMALL = f"--config={CONFIGS / 'small_dsa.py'}"
V32 = f"--config={pathlib.Path(__file__).parents[2] / 'configs' / 'deepseek_v32.py'}"
needs_compilers = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))


@pytest.mark.slow
def test_time_memory_and_decoding_beside_dense(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "result.json", tmp_path / "dsa.png"
    argv = ["--tokens=128,64", "--max_tokens=64", "--repeats=1", "--decoded=1"]
    bench.main(["dsa", SMALL, *argv, f"--out={out}", f"--plot={picture}"])
    report = json.loads(out.read_text())
    assert report["bench"] == "dsa" and report["device"]["kind"] == "cpu"
    results = report["results"]
    assert results["attention"]["index_topk"] == 6 and results["precision"]["compute"]
    assert [row["tokens"] for row in results["lengths"]] == [64]
    for row in results["lengths"]:
        ratio = row["dense_us_per_token"] / row["sparse_us_per_token"]
        assert row["dense_over_sparse_time"] == pytest.approx(ratio)
        # The row and its gradient are arguments and results, and of that size are the outputs of projections at least.
        assert min(row["dense_temporary_bytes"], row["sparse_temporary_bytes"]) > row["tokens"] * 8 * 4
    decode = results["decode"]
    assert decode["context"] == 64
    assert decode["dense_over_sparse_time"] == pytest.approx(decode["dense_ms"] / decode["sparse_ms"])
    assert picture.read_bytes().startswith(b"\x89PNG") and 5_000 < picture.stat().st_size < 100_000
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n{picture}\n"
    assert printed.err.splitlines()[:2] == [dsa.HEADER, *map(dsa.line, results["lengths"])]
    assert "break-even: " in printed.err and "decoding with 64 tokens in the cache: dense " in printed.err


def test_break_even_lies_between_lengths():
    assert dsa.break_even([(1000, 0.5), (2000, 2.0), (4000, 3.0)]) == pytest.approx(2000**0.5 * 1000**0.5)
    assert dsa.break_even([(1000, 0.5), (2000, 1.0)]) == pytest.approx(2000)
    found = dsa.break_even([(1000, 1.5), (2000, 0.9), (4000, 1.1)])
    assert found is not None and 2000 < found < 4000  # noise in front of it does not count
    assert dsa.break_even([(1000, 0.5), (2000, 0.9)]) is None
    assert dsa.break_even([(1000, 1.1), (2000, 2.0)]) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_tokens=1000"], "--max_tokens=1000 leaves no length of 2048, 4096"),
        (["--tokens=0"], "must be positive"),
        (["--plot=/nowhere/dsa.png"], "--plot=/nowhere/dsa.png: no such directory"),
        (["--out=/nowhere/dsa.json"], "--out=/nowhere/dsa.json: no such directory"),
        (["--compile_for=v5p"], "give --config"),
        ([SMALL.replace("small_dsa", "small")], "model.attention is MlaConfig; sparse attention is DsaConfig"),
        ([SMALL, "--compile_for=v5q"], "--compile_for=v5q: no chip 'v5q'; there are v5e, v5p"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(argv, message, monkeypatch):
    monkeypatch.setattr(dsa, "measure", pytest.fail)
    monkeypatch.setattr(dsa, "compile_for", pytest.fail)
    with pytest.raises(UserError, match=message):
        bench.main(["dsa", *argv])


@needs_compilers
@pytest.mark.parametrize("chip", ["v5p", "h200"])
def test_a_block_is_compiled_for_a_chip(chip, tmp_path, capsys):
    out = tmp_path / "result.json"
    bench.main(["dsa", SMALL, f"--compile_for={chip}", f"--out={out}"])
    results = json.loads(out.read_text())["results"]
    assert (results["tokens"], results["chip"]) == (16, chip) and results["bytes"]["temporaries"] > 0
    assert f"16 tokens through one block on one {chip}: " in capsys.readouterr().err


@pytest.mark.slow
@needs_compilers
@pytest.mark.parametrize("chip", ["v5p", "h200"])
def test_128k_tokens_through_a_block_of_deepseek_v32(chip, tmp_path):
    """In less than 16 GB, parameters, the row, its output and all gradients included."""
    out = tmp_path / "result.json"
    bench.main(["dsa", V32, "--config.model.precision.param=bfloat16", f"--compile_for={chip}", f"--out={out}"])
    results = json.loads(out.read_text())["results"]
    assert (results["tokens"], results["hidden_size"], results["attention"]["index_topk"]) == (131072, 7168, 2048)
    assert 8e9 < results["bytes"]["peak"] < 16e9
