"""The TPU kernels of attention on a simulated chip against the equation in float64, and which tiles they walk over."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import interpreted
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_flash_attention import ADVERSARIAL, FACTORS, Case, all_pairs, check_bfloat16, check_float32

from kernels_pallas import Mask, flash_attention
from kernels_pallas.flash_attention import tpu, tpu_walk
from kernels_pallas.flash_attention.tpu_plan import PARTLY, PASS, WHOLLY, Plan, Tile
from kernels_pallas.flash_attention.tpu_walk import Walk
from kernels_pallas.select import Unsupported

SMALL = Tile(queries=128, keys=256, keys_at_once=128)

# Each over several tiles of SMALL.
CASES = {
    "causal": Case(lengths=(260, 260), heads=(2, 1), causal=True),
    "a window, sinks, queries after keys": Case(
        lengths=(150, 400), heads=(2, 1), causal=True, window=(150, None), offset=250, sinks=True, batch=1
    ),
    "a window to both sides, softcap": Case(lengths=(260, 260), window=(100, 50), softcap=2.0, heads=(1, 1), batch=1),
    "packed": Case(lengths=(260, 260), heads=(1, 1), causal=True, segments="packed"),
    "shuffled segments": Case(lengths=(130, 260), segments="shuffled", heads=(3, 1), batch=1),
    "a window in a cache": Case(
        lengths=(130, 400), heads=(2, 2), causal=True, positions="cache", window=(130, None), segments="packed"
    ),
    "everything, wide": Case(
        lengths=(130, 270),
        dims=(192, 128),
        heads=(2, 1),
        offset=140,
        causal=True,
        window=(100, None),
        segments="packed",
        softcap=2.0,
        sinks=True,
        batch=1,
    ),
    "absorbed": Case(dims=(576, 512), heads=(2, 1), causal=True, batch=1),
}
QUICK = ["a row of padding alone, sinks", "narrow heads"]
EDGES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name, case in ADVERSARIAL.items()
    if not case.selected
]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(Tile, "of", lambda *_, **__: SMALL)


ONE_KERNEL, TWO_KERNELS = 16 << 20, 0  # of the backward pass: bytes that dq may take in VMEM


def each_with_one_or_two_kernels(names):
    """Every name with one of the two in turn; the other among the slow tests."""
    for number, name in enumerate(names):
        quick, slow = (ONE_KERNEL, TWO_KERNELS)[:: 1 if number % 2 else -1]
        yield pytest.param(name, quick, id=f"{name}-{quick}")
        yield pytest.param(name, slow, id=f"{name}-{slow}", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "dq_bytes"), list(each_with_one_or_two_kernels(CASES)))
def test_over_several_tiles(name, dq_bytes, small_tiles, monkeypatch):
    monkeypatch.setattr(tpu, "WHOLE_DQ_BYTES", dq_bytes)
    with interpreted("tpu"):
        check_float32(CASES[name], "tpu")


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    with interpreted("tpu"):
        check_float32(ADVERSARIAL[name], "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", all_pairs(), ids=lambda c: f"{c.dims}-{c.heads}")
def test_features_in_pairs(case):
    with interpreted("tpu"):
        check_float32(case, "tpu")


@pytest.mark.parametrize(
    "dims", [FACTORS["dims"][0], *(pytest.param(d, marks=pytest.mark.slow) for d in FACTORS["dims"][1:])]
)
def test_rounding_in_bfloat16(dims, small_tiles):
    with interpreted("tpu"):
        check_bfloat16(
            Case(dims=dims, heads=(2, 1), lengths=(260, 260), causal=True, softcap=2.0, sinks=True, batch=1), "tpu"
        )


@pytest.mark.device
@pytest.mark.parametrize("name", CASES)
def test_on_a_chip(name):
    if jax.default_backend() != "tpu":
        pytest.skip(f"no device for 'tpu': this is {jax.default_backend()}")
    check_bfloat16(CASES[name], "tpu")


# ---- which tiles


def kinds(
    mask: Mask, queries: int, keys: int, by_queries: bool = True, batch: int = 1
) -> list[list[tuple[int, int, int]]]:
    """(block of queries, block of keys, what is visible) in the order of the walk, for each list."""
    q, k = (jax.ShapeDtypeStruct((batch, length, 1, 8), jnp.float32) for length in (queries, keys))
    found = []

    def trace(q, k):
        walk = Walk(plan=Plan.of(q, k, k, mask, Tile(queries=128, keys=128, keys_at_once=128)), by_queries=by_queries)
        found.extend(walk.tiles)
        return q

    with jax.disable_jit():
        trace(jnp.zeros(q.shape), jnp.zeros(k.shape))
    outer, codes = (np.asarray(a) for a in found)
    sides = lambda o, i: (o, i) if by_queries else (i, o)  # noqa: E731
    return [
        [(*sides(int(o), int(c >> 2)), int(c & 3)) for o, c in zip(outer, row, strict=True)]
        for row in codes.reshape(-1, outer.size)
    ]


def test_indices_decide_which_tiles_are_listed():
    assert kinds(Mask(), 256, 256) == [[(0, 0, WHOLLY), (0, 1, WHOLLY), (1, 0, WHOLLY), (1, 1, WHOLLY)]]
    triangle = [(0, 0, PARTLY), (1, 0, WHOLLY), (1, 1, PARTLY), (2, 0, WHOLLY), (2, 1, WHOLLY), (2, 2, PARTLY)]
    assert kinds(Mask(causal=True), 384, 384) == [triangle]
    by_keys = [tile for j in range(3) for tile in triangle if tile[1] == j]
    assert kinds(Mask(causal=True), 384, 384, by_queries=False) == [by_keys]
    window = [(0, 0, PARTLY), (1, 0, PARTLY), (1, 1, PARTLY), (2, 1, PARTLY), (2, 2, PARTLY)]
    assert kinds(Mask(causal=True, window=(100, None)), 384, 384) == [window]
    assert kinds(Mask(causal=True, q_offset=128), 128, 256) == [[(0, 0, WHOLLY), (0, 1, PARTLY)]]
    assert kinds(Mask(), 100, 200) == [[(0, 0, WHOLLY), (0, 1, PARTLY)]], "padded keys are masked"


def test_blocks_without_a_visible_tile_are_written_all_the_same():
    assert kinds(Mask(causal=True, q_offset=-128), 256, 256) == [[(0, 0, PASS), (1, 0, PARTLY)]]
    assert kinds(Mask(causal=True, q_offset=-128), 256, 256, by_queries=False) == [[(1, 0, PARTLY), (1, 1, PASS)]]


def test_segments_decide_what_is_passed_over():
    ids = jnp.repeat(jnp.array([[1, 2, 2], [1, 1, 0]], jnp.int32), 128, axis=1)
    mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
    first, second = kinds(mask, 384, 384, batch=2)
    # What is passed over keeps the block of keys that is there.
    assert first == [(0, 0, PARTLY), (1, 0, PASS), (1, 1, PARTLY), (2, 1, PASS), (2, 1, WHOLLY), (2, 2, PARTLY)]
    assert second == [(0, 0, PARTLY), (1, 0, WHOLLY), (1, 1, PARTLY), (2, 1, PASS), (2, 1, PASS), (2, 1, PASS)]


def test_padding_does_not_join_segments():
    ids = jnp.repeat(jnp.array([[1, 1, 2, 2, 2, 0]], jnp.int32), 64, axis=1)
    mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
    assert kinds(mask, 384, 384) == [
        [(0, 0, PARTLY), (1, 0, PASS), (1, 1, PARTLY), (2, 1, PASS), (2, 1, PARTLY), (2, 2, PARTLY)]
    ]


def test_positions_decide_what_is_passed_over():
    at = jnp.arange(256, dtype=jnp.int32)[None]
    mask = Mask(causal=True, q_positions_BT=at[:, 128:], kv_positions_BS=at)
    assert kinds(mask, 128, 256) == [[(0, 0, WHOLLY), (0, 1, PARTLY)]]
    mask = Mask(causal=True, q_positions_BT=at[:, :128], kv_positions_BS=at)
    assert kinds(mask, 128, 256) == [[(0, 0, PARTLY), (0, 0, PASS)]]
    mask = Mask(window=(None, None), q_positions_BT=at[:, :128], kv_positions_BS=at)
    assert kinds(mask, 128, 256) == [[(0, 0, WHOLLY), (0, 1, WHOLLY)]]


def test_a_list_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(tpu_walk, "SMEM_BYTES", 4 * 8)
    ids = jnp.ones((1, 256), jnp.int32)
    assert kinds(Mask(q_segment_ids_BT=ids, kv_segment_ids_BS=ids), 256, 256)[0][0] == (0, 0, WHOLLY)
    ids = jnp.ones((2, 256), jnp.int32)  # a list for each row would not fit: one for all
    assert kinds(Mask(q_segment_ids_BT=ids, kv_segment_ids_BS=ids), 256, 256, batch=2)[0][0] == (0, 0, PARTLY)
    with pytest.raises(Unsupported, match="9 tiles are too many"):
        kinds(Mask(), 384, 384)


@pytest.mark.parametrize("queries", [1, 100, 128, 300, 1000, 1024, 1500, 4096, 131072])
@pytest.mark.parametrize("width", [64, 192, 576])
@pytest.mark.parametrize("tall", [False, True])
def test_every_length_has_tiles_that_pad_little(queries, width, tall):
    a = jax.ShapeDtypeStruct((1, queries, 1, width), jnp.bfloat16)
    tile = Tile.of(a, a, a, tall=tall)  # pyright: ignore[reportArgumentType]
    for size in (tile.queries, tile.keys):
        assert -queries % size < 128 * -(-queries // size)


@pytest.mark.parametrize("wrong", [{"queries": 100}, {"keys": 0}, {"keys_at_once": 384}, {"queries": 4096}])
def test_tiles_that_no_chip_can_take_are_refused(wrong):
    with pytest.raises(ValueError, match="Tile"):
        Tile(**wrong)


def test_what_it_cannot_do_it_says():
    q = jnp.ones((1, 4, 1, 8), jnp.float16)
    with pytest.raises(Unsupported, match="takes bfloat16 and float32, not float16"):
        flash_attention(q, q, q, scale=1.0, mask=Mask(), implementation="tpu")
    q = jnp.ones((1, 4, 1, 8))
    with pytest.raises(Unsupported, match="no selected_BTS"):
        mask = Mask(selected_BTS=jnp.ones((1, 4, 4), bool))
        flash_attention(q, q, q, scale=1.0, mask=mask, implementation="tpu")


# ---- transforms and meshes


def gradient(implementation, q, k, ids):
    def loss(q, k):
        mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
        return jnp.sum(flash_attention(q, k, k, scale=0.3, mask=mask, implementation=implementation) ** 2)

    return jax.grad(loss, argnums=(0, 1))(q, k)


def operands(*leading: int):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((*leading, 150, heads, 8)), jnp.float32) for heads in (2, 2))
    return q, k, jnp.asarray(np.sort(rng.integers(0, 4, (*leading, 150)), axis=-1), jnp.int32)


def test_inside_shard_map(small_tiles):
    args = operands(2)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    specs = P("data", None, "tensor"), P("data", None, "tensor"), P("data")
    want = jax.jit(functools.partial(gradient, "xla"))(*args)
    with jax.set_mesh(mesh), interpreted("tpu"):
        placed = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a, spec in zip(args, specs, strict=True)]
        local = jax.shard_map(functools.partial(gradient, "tpu"), in_specs=specs, out_specs=specs[:2])
        got = jax.block_until_ready(jax.jit(local)(*placed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_vmap(small_tiles):
    args = operands(2, 1)
    want = jax.jit(jax.vmap(functools.partial(gradient, "xla")))(*args)
    with interpreted("tpu"):
        got = jax.block_until_ready(jax.jit(jax.vmap(functools.partial(gradient, "tpu")))(*args))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_twice_the_same_bits(small_tiles):
    args = operands(1)
    with interpreted("tpu"):
        first, second = (jax.block_until_ready(jax.jit(functools.partial(gradient, "tpu"))(*args)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
