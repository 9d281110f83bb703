"""The kernels of index scores on simulated chips against float64 NumPy. That they compile is in test_aot.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Way, interpreted
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_lightning_indexer import CASES, Case, chosen_keys, scores

from kernels_pallas import Mask, Unsupported
from kernels_pallas.lightning_indexer import gpu, select_keys, tiles, to_fp8, topk, tpu
from kernels_pallas.lightning_indexer.selection import Scores

# On TPU tiles of 128 keys by 16 queries: several of both, the last ones partial.
LONG = {
    "causal": Case(name="causal", lengths=(37, 300), offset=263, heads=5, topk=40),
    "packed documents": Case(name="packed documents", lengths=(150, 150), packed=True, window=(20, None), topk=9),
    "a cache": Case(name="a cache", lengths=(3, 290), cached=True, topk=6),
}
EDGES = [CASES[name] for name in ("all keys", "one query", "a selection")]


@pytest.fixture
def small_tiles(monkeypatch):
    for name, value in {"BLOCK": 48, "CPU_BLOCK": 48, "LEAST_CHUNK": 128, "CPU_TILE": 1}.items():
        monkeypatch.setattr(tiles, name, value)
    monkeypatch.setattr(tpu, "KEYS", 128)
    monkeypatch.setattr(tpu, "QUERIES", 16)


@pytest.fixture
def scores_alone(monkeypatch):
    """`select_keys` gives all sortable scores [B, T, padded S]: to compile the choice takes far longer than a kernel."""

    monkeypatch.setattr(Scores, "choose", lambda self, topk: self.over_blocks(lambda step, key_btS: key_btS))


def unsorted(key: np.ndarray) -> np.ndarray:
    """The scores of sortable integers; -inf for HIDDEN."""
    bits = np.where(key < 0, key ^ np.iinfo(np.int32).max, key).astype(np.int32)
    return np.where(key == topk.HIDDEN, -np.inf, bits.view(np.float32))


def assert_scores(key: jax.Array, want: np.ndarray, visible: np.ndarray, atol: float = 0) -> None:
    got, num_keys = unsorted(np.asarray(key)), want.shape[2]
    np.testing.assert_allclose(got[:, :, :num_keys], np.where(visible, want, -np.inf), rtol=0, atol=atol)
    assert (got[:, :, num_keys:] == -np.inf).all()


def run(case: Case, implementation: str, dtype=jnp.float32, where: str = "interpreted") -> jax.Array:
    q, w, k = case.operands()
    operands = jnp.asarray(q, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(k, dtype)
    call = functools.partial(select_keys, mask=case.mask(), topk=case.topk)
    return Way(implementation=implementation, where=where).run(call, *operands)


def check_scores(case: Case, implementation: str, dtype=jnp.float32) -> None:
    """Scores of small integers and quarters are exact."""
    assert_scores(run(case, implementation, dtype), scores(*case.operands()), case.visible())


def check_choice(case: Case, index: jax.Array) -> None:
    np.testing.assert_array_equal(index, chosen_keys(scores(*case.operands()), case.visible(), case.topk))


@pytest.mark.parametrize(
    "case", [*LONG.values(), *(pytest.param(case, marks=pytest.mark.slow) for case in EDGES)], ids=str
)
def test_scores_on_tpu(case, small_tiles, scores_alone):
    check_scores(case, "tpu")


def test_choice_on_tpu():
    """Half of the scores are zero, and the first queries see fewer keys than are chosen."""
    case = CASES["one head, so that half of the scores are zero"]
    check_choice(case, run(case, "tpu", jnp.bfloat16))


# Small enough for an interpreter that works through every instruction.
HOPPER = [
    Case(name="packed documents", lengths=(5, 270), packed=True, causal=False, window=(200, None), offset=250, topk=4),
    Case(name="tiles of queries", lengths=(100, 270), offset=170, topk=7),
    CASES["one query"],
]


@pytest.mark.parametrize("case", [HOPPER[0], *(pytest.param(c, marks=pytest.mark.slow) for c in HOPPER[1:])], ids=str)
def test_scores_on_hopper(case, monkeypatch, scores_alone):
    """Queries in two parts, of up to four tiles of 16, of which two are in shared memory."""
    monkeypatch.setattr(gpu, "STAGES", 2)
    monkeypatch.setattr(gpu, "choose_splits", lambda blocks, turns, num_sms: min(2, turns))
    check_scores(case, "gpu", jnp.bfloat16)


@pytest.mark.device
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("case", [*LONG.values(), *EDGES], ids=str)
def test_choice_on_a_chip(case, implementation):
    check_choice(case, run(case, implementation, jnp.bfloat16, where="device"))


FP8 = ["tpu", pytest.param("gpu", marks=pytest.mark.slow)]


@pytest.mark.parametrize("implementation", FP8)
def test_fp8_scores_are_those_of_the_rounded_values(implementation, scores_alone):
    """Values that FP8 holds exactly, at scales that differ from token to token."""
    rng = np.random.default_rng(0)
    size = 2.0 ** rng.integers(-3, 4, (1, 12, 1))
    q, k = rng.integers(-8, 9, (1, 12, 3, 16)) * size[..., None], rng.integers(-8, 9, (1, 12, 16)) * size
    w = rng.integers(-4, 5, (1, 12, 3)) * 1.0
    *operands, k_scale_BS = to_fp8(*(jnp.asarray(a, jnp.float32) for a in (q, w, k)))
    call = functools.partial(select_keys, mask=Mask(causal=True), topk=5)
    way = Way(implementation=implementation, where="interpreted")
    key = way.run(lambda *args, **how: call(*args[:3], k_scale_BS=args[3], **how), *operands, k_scale_BS)
    assert_scores(key, scores(q, w, k), np.tri(12, dtype=bool))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_scores_of_real_numbers(dtype, scores_alone):
    """A logit is a sum of 128 products, a score one of 9 logits of size 11 by weights of size 1.

    float32 sums of that many terms of both signs are right to 2^-20 of the sum of magnitudes, some 1e3 at most.
    """
    rng = np.random.default_rng(0)
    shapes = (2, 20, 9, 128), (2, 20, 9), (2, 130, 128)
    q, w, k = (rng.standard_normal(shape).astype(jnp.bfloat16) for shape in shapes)
    call = functools.partial(select_keys, mask=Mask(causal=True, q_offset=110), topk=3)
    operands = (jnp.asarray(a, dtype) for a in (q, w, k))
    key = Way(implementation="tpu", where="interpreted").run(call, *operands)
    visible = np.arange(130) <= np.arange(20)[:, None] + 110
    assert_scores(key, scores(*(a.astype(np.float64) for a in (q, w, k))), visible, atol=1e-3)


def test_hidden_keys_may_hold_anything(small_tiles, scores_alone):
    q, w, k = (jnp.asarray(a, jnp.float32) for a in LONG["causal"].operands())
    mask = Mask(causal=True, q_offset=100)
    with interpreted("tpu"):
        run = jax.jit(lambda k: select_keys(q[:, :5], w[:, :5], k, mask=mask, topk=4, implementation="tpu"))
        np.testing.assert_array_equal(run(k.at[:, 105:].set(jnp.nan)), run(k))


def test_inside_shard_map(small_tiles, scores_alone):
    """Rows over one axis, and arguments that are the same on another."""
    case = LONG["packed documents"]
    mesh = jax.make_mesh((2, 2), ("rows", "other"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh), interpreted("tpu"):
        operands = *(jnp.asarray(a, jnp.float32) for a in case.operands()), case.mask()
        args = jax.device_put(operands, jax.NamedSharding(mesh, P("rows")))
        local = jax.shard_map(
            lambda q, w, k, mask: select_keys(q, w, k, mask=mask, topk=case.topk, implementation="tpu"),
            in_specs=P("rows"),
            out_specs=P("rows"),
        )
        key = jax.block_until_ready(jax.jit(local)(*args))
    assert_scores(key, scores(*case.operands()), case.visible())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_it_lowers_for_hopper(dtype, packed, scores_alone):
    """Inside of shard_map: 64 heads, and 5 that are padded."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    ids = jax.ShapeDtypeStruct((2, 300), jnp.int32) if packed else None

    def call(q, w, k, k_scale_BS, ids):
        mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
        return select_keys(q, w, k, k_scale_BS=k_scale_BS, mask=mask, topk=70, implementation="gpu")

    for heads in (64, 5):
        shapes = ((2, 300, heads, 128), dtype), ((2, 300, heads), jnp.float32), ((2, 300, 128), dtype)
        args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        scale = jax.ShapeDtypeStruct((2, 300), jnp.float32) if packed else None
        with jax.set_mesh(mesh):
            local = jax.shard_map(call, in_specs=P("rows"), out_specs=P("rows"))
            lowered = jax.jit(local).trace(*args, scale, ids).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def test_splits_fill_the_chip_in_whole_waves():
    assert gpu.choose_splits(blocks=16, turns=128, num_sms=132) == 8, "nine would take two waves"
    assert gpu.choose_splits(blocks=512, turns=128, num_sms=132) == 1
    assert gpu.choose_splits(blocks=1, turns=1, num_sms=132) == 1


@pytest.mark.parametrize(
    ("implementation", "dtype", "heads", "width", "said"),
    [
        ("tpu", jnp.float16, 2, 8, "on TPU has float32, bfloat16 and FP8, not float16"),
        ("tpu", jnp.float32, 64, 8192, "no room for 64 index heads of 8192 numbers"),
        ("gpu", jnp.float32, 2, 8, "on gpu has bfloat16, float16 and float8_e4m3fn, not float32"),
        ("gpu", jnp.bfloat16, 257, 128, "no room for 264 index heads of 256 bytes"),
        ("gpu", jnp.bfloat16, 8, 512, "no room for 8 index heads of 1024 bytes"),
    ],
)
def test_what_it_lacks_is_said(implementation, dtype, heads, width, said):
    q, w, k = (jnp.ones(shape, dtype) for shape in ((1, 2, heads, width), (1, 2, heads), (1, 3, width)))
    with pytest.raises(Unsupported, match=said):
        select_keys(q, w, k, mask=Mask(), topk=1, implementation=implementation)
