"""The benches of the choice of keys and of attention to them run and report what they promise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench
from experiments.benches import select_keys, sparse_attention
from experiments.errors import UserError
from kernels_pallas.lightning_indexer import shapes as index_shapes
from kernels_pallas.lightning_indexer import topk
from kernels_pallas.sparse_attention import shapes as attention_shapes


def run(tmp_path, *argv):
    out = tmp_path / "result.json"
    bench.main([*argv, f"--out={out}", "--repeats=1"])
    result = json.loads(out.read_text())
    assert result["bench"] == argv[0] and result["device"]["kind"] == "cpu"
    return result["results"]


def test_select_keys(tmp_path, monkeypatch):
    shape = index_shapes.Shape(queries=6, keys=40, index_heads=2, index_width=8, topk=10)
    large = index_shapes.Shape(queries=10**5, keys=10**6)
    monkeypatch.setattr(select_keys, "SHAPES", {"tiny": shape, "large": large})
    rows = run(tmp_path, "select_keys", "--dtypes=fp8")
    assert [(row["op"], row["dtype"], row["implementation"]) for row in rows] == [
        ("select_keys", "fp8", "xla"),
        ("scores", "fp8", "xla"),
        ("choice", "float32", "xla"),
        ("choice", "float32", "top_k"),
    ]
    for row in rows[:2]:
        pairs = sum(range(35, 41))  # keys that the six last of 40 tokens see
        assert row["tflop_per_second"] == pytest.approx(2 * pairs * 2 * 8 / row["us"] / 1e6)
        assert row["shape"] == "tiny" and row["times_xla"] == 1
    for row in rows[2:]:
        assert row["passes"] > 0 and row["gb_per_second"] == pytest.approx(6 * 40 * 4 / row["us"] / 1e3)
    assert rows[3]["times_top_k"] == 1


def test_what_select_keys_times_is_the_op():
    """The best scores and the choice among scores, by NumPy; with keys that are padded."""
    rng = np.random.default_rng(0)
    q, w, k = rng.integers(-4, 5, (1, 6, 2, 8)), rng.integers(-4, 5, (1, 6, 2)), rng.integers(-4, 5, (1, 40, 8))
    shape = index_shapes.Shape(queries=6, keys=40, topk=10)
    best = select_keys._best(shape, "xla", *(jnp.asarray(a, jnp.float32) for a in (q, w, k)), None)
    scores = np.einsum("bti,btis->bts", w, np.maximum(np.einsum("btij,bsj->btis", q, k), 0))
    visible = np.arange(40) <= 34 + np.arange(6)[:, None]
    largest = np.where(visible, scores, -np.inf).max(-1)
    bits = largest.astype(np.float32).view(np.int32)  # what stands for a score that is not negative
    assert largest.min() >= 0
    np.testing.assert_array_equal(best, bits)
    chosen = jax.jit(lambda a: select_keys._choose(shape, topk.sortable(a)))(jnp.asarray(scores, jnp.float32))
    np.testing.assert_array_equal(chosen, np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :10], axis=-1))


def test_sparse_attention(tmp_path, monkeypatch):
    shape = attention_shapes.Shape(queries=6, keys=40, heads=2, selected=5)
    large = attention_shapes.Shape(queries=10**5, keys=10**6, heads=16)
    monkeypatch.setattr(sparse_attention, "SHAPES", {"tiny": shape, "large": large})
    forward, backward = run(tmp_path, "sparse_attention")
    for row, way, width in ((forward, "forward", 576 + 512), (backward, "backward", 3 * 576 + 2 * 512)):
        assert (row["shape"], row["pass"], row["implementation"], row["times_xla"]) == ("tiny", way, "xla", 1)
        assert row["tflop_per_second"] == pytest.approx(2 * 6 * 2 * 5 * width / row["us"] / 1e6)
        assert row["gathered_gb_per_second"] == pytest.approx(6 * 5 * 576 * 2 / row["us"] / 1e3)


@pytest.mark.parametrize(
    ("name", "shapes", "flags"),
    [
        ("select_keys", index_shapes.SHAPES, select_keys.SelectKeysFlags),
        ("sparse_attention", attention_shapes.SHAPES, sparse_attention.SparseAttentionFlags),
    ],
)
def test_shapes_for_any_machine(name, shapes, flags):
    """Some are small enough by default; where flags leave none, it is said."""
    assert 0 < len(flags().shapes) < len(shapes) == len(flags(max_gflop=1e9).shapes)
    with pytest.raises(UserError, match="leave no shape of"):
        bench.main([name, "--contains=nothing"])
