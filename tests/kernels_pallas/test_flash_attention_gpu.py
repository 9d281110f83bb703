"""The Hopper kernels of attention on a simulated chip against the equation in float64. That they compile is in test_aot.py."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import interpreted
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_flash_attention import ADVERSARIAL, Case, all_pairs, check_bfloat16, computed

from kernels_pallas import Mask, Unsupported, flash_attention
from kernels_pallas.flash_attention import gpu, gpu_backward
from kernels_pallas.flash_attention.hopper import (
    PRODUCER_REGISTERS,
    REGISTERS,
    WARPGROUPS,
    WIDEST_PRODUCT,
    halves,
    pad_widths,
)
from kernels_pallas.flash_attention.hopper_walk import Band, Walk

# Each over several tiles of 64 keys, blocks of 128 queries, or both. "every time" only what differs most: seconds each.
CASES = {
    "causal, grouped": Case(dims=(64, 64), heads=(2, 1), lengths=(200, 200), batch=1, causal=True),
    "wide keys, a window, softcap and sinks": Case(
        dims=(192, 128),
        heads=(1, 1),
        lengths=(70, 150),
        batch=1,
        causal=True,
        offset=80,
        window=(60, None),
        softcap=2.0,
        sinks=True,
    ),
    "queries before all keys, segments": Case(
        dims=(64, 128), heads=(1, 1), lengths=(150, 70), batch=1, causal=True, offset=-60, segments="shuffled"
    ),
    "a window to both sides": Case(
        dims=(48, 32), heads=(1, 1), lengths=(140, 330), batch=1, window=(100, 5), offset=10
    ),
    "packed, wide": Case(dims=(256, 256), heads=(2, 2), lengths=(130, 150), batch=1, segments="packed", softcap=2.0),
    "grouped, split": Case(dims=(192, 128), heads=(2, 1), lengths=(140, 130), batch=1, causal=True, offset=-10),
    "absorbed": Case(dims=(576, 512), heads=(2, 1), lengths=(70, 130), batch=1, causal=True, offset=60),
    "absorbed, packed": Case(
        dims=(576, 512),
        heads=(1, 1),
        lengths=(140, 140),
        batch=1,
        causal=True,
        segments="packed",
        softcap=2.0,
        sinks=True,
    ),
    "wide keys alone": Case(dims=(320, 64), heads=(1, 1), lengths=(70, 70), batch=1, causal=True),
    "widths of odd halves": Case(dims=(96, 160), heads=(2, 1), lengths=(140, 70), batch=1, window=(80, 20), offset=-30),
    "positions": Case(dims=(64, 64), heads=(2, 1), lengths=(130, 270), batch=2, causal=True, positions="cache"),
    "positions, segments and a window": Case(
        dims=(96, 96),
        heads=(1, 1),
        lengths=(130, 200),
        batch=2,
        causal=True,
        window=(70, None),
        positions="tail",
        segments="packed",
        softcap=2.0,
    ),
    "one query": Case(dims=(64, 64), heads=(2, 1), lengths=(1, 330), causal=True, offset=329),
    "nothing hidden": Case(dims=(64, 64), heads=(1, 1), lengths=(128, 192)),
}
EVERY_TIME = {"causal, grouped", "wide keys, a window, softcap and sinks", "queries before all keys, segments"}


def some_slow(cases, every_time):
    return [name if name in every_time else pytest.param(name, marks=pytest.mark.slow) for name in cases]


@pytest.fixture
def interpretable(monkeypatch):
    """Tiles small enough for several of them, with what the interpreter can run."""

    through_shared_memory = functools.partial(dataclasses.replace, in_shared_memory=True)

    def choose(K, U):
        wide = max(K, U) > WIDEST_PRODUCT
        tile = gpu.Tile(keys=64, stages=1 if wide else 2, qk_width=K, v_width=U, split=wide)
        return through_shared_memory(tile)

    def choose_dq(K, U, choose=gpu_backward.choose_dq):
        return through_shared_memory(choose(K, U))

    def choose_dk_dv(K, U, choose=gpu_backward.choose_dk_dv):
        return list(map(through_shared_memory, choose(K, U)))

    monkeypatch.setattr(gpu, "choose", choose)
    monkeypatch.setattr(gpu_backward, "choose_dq", choose_dq)
    monkeypatch.setattr(gpu_backward, "choose_dk_dv", choose_dk_dv)
    with interpreted("gpu"):
        yield


@pytest.mark.parametrize("name", some_slow(CASES, EVERY_TIME))
def test_over_several_tiles(name, interpretable):
    check_bfloat16(CASES[name], "gpu")


EDGES = [name for name, case in ADVERSARIAL.items() if not case.selected]


@pytest.mark.parametrize("name", some_slow(EDGES, {"a row of padding alone, sinks"}))
def test_edges(name, interpretable):
    check_bfloat16(ADVERSARIAL[name], "gpu")


def features_in_pairs():
    # The sum over bfloat16 outputs in api.py, the same to the last digit with XLA.
    rounded = pytest.mark.xfail(
        strict=True, reason="dsinks of this case has four times the error of the plain computation"
    )
    for case in all_pairs():
        name = f"{case.dims}-{case.heads}"
        yield pytest.param(case, id=name, marks=[rounded] if name == "(128, 128)-(8, 2)" else [])


@pytest.mark.slow
@pytest.mark.parametrize("case", list(features_in_pairs()))
def test_features_in_pairs(case, interpretable):
    check_bfloat16(case, "gpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal, grouped", "grouped, split", "absorbed"])
def test_twice_the_same_bits(name, interpretable):
    first, second = (computed(CASES[name], jnp.bfloat16, "gpu") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.device
@pytest.mark.parametrize("name", CASES)
def test_on_a_chip(name):
    if jax.default_backend() != "gpu":
        pytest.skip(f"no device for 'gpu': this is {jax.default_backend()}")
    check_bfloat16(CASES[name], "gpu")
    first, second = (computed(CASES[name], jnp.bfloat16, "gpu") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def operands(*leading: int):
    """q, k and v of 200 queries and keys, and ids."""
    q, k = jnp.zeros((*leading, 200, 2, 64), jnp.bfloat16), jnp.zeros((*leading, 200, 1, 64), jnp.bfloat16)
    return q, k, k, jnp.ones((*leading, 200), jnp.int32)


def gradients(q, k, v, ids):
    mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)

    def loss(q, k, v):
        return flash_attention(q, k, v, scale=0.1, mask=mask, implementation="gpu").astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def scanned(q, k, v, ids):
    body = jax.checkpoint(lambda q, _: (gradients(q, k, v, ids)[0], None))
    return jax.lax.scan(body, q, None, length=2)[0]


@pytest.mark.parametrize(("fn", "leading"), [(jax.vmap(gradients), (2, 1)), (scanned, (1,))], ids=["vmap", "scan"])
def test_lowers_inside_transforms(fn, leading):
    assert "mosaic_gpu" in jax.jit(fn).trace(*operands(*leading)).lower(lowering_platforms=("cuda",)).as_text()


def test_lowers_inside_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    spec = P("data")
    with jax.set_mesh(mesh):
        args = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in operands(2)]
        local = jax.shard_map(gradients, in_specs=(spec,) * 4, out_specs=(spec,) * 3)
        assert "mosaic_gpu" in jax.jit(local).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


# ---- which tiles


@pytest.mark.parametrize("low", [None, -130, -64, -1, 20])
@pytest.mark.parametrize("high", [None, -40, 0, 1, 64, 200])
def test_tiles_that_no_query_sees_are_skipped(low, high):
    """Against the definition; a tile without a mask is one that every query sees whole."""
    if low is not None and high is not None and low >= high:
        return
    for num_keys, keys in ((300, 64), (256, 128)):
        band = Band(low=low, high=high, num_queries=300, num_keys=num_keys)
        for row in (0, 128, 256):
            queries, all_keys = np.arange(row, row + 128)[:, None], np.arange(-(-num_keys // keys) * keys)
            seen = np.broadcast_to(all_keys < num_keys, (128, all_keys.size))
            seen = seen & (low is None or all_keys >= queries + low) & (high is None or all_keys < queries + high)
            tiles = seen.reshape(128, -1, keys)
            a, b, c, d = map(int, band.key_tiles(jnp.int32(row), 128, keys))
            assert a <= b <= c <= d
            walked = {tile: not b <= tile < c for tile in range(a, d)}
            assert set(np.flatnonzero(tiles.any((0, 2)))) <= set(walked)
            assert all(tiles[:, tile].all() for tile, masked in walked.items() if not masked)
            assert all(tiles[:, tile].any() for tile in walked), "a tile for nothing"


def walks(mask: Mask, length: int, rows: int, columns: int) -> list[np.ndarray]:
    """Tiles of each block, of queries over keys and of keys over queries, as many of the one as of the other."""
    end = -(-length // 128) * 128
    lengths, padded = (length, length), (end, end)

    @jax.jit
    def tiles(mask):
        return [
            along(mask, lengths, padded, rows, columns).arrays[2] for along in (Walk.along_queries, Walk.along_keys)
        ]

    return list(map(np.asarray, tiles(mask)))


def documents(*lengths: int, total: int) -> np.ndarray:
    """Ids of documents, and padding."""
    ids = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return np.pad(ids, (0, total - ids.size))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["segments", "positions", "both", "shuffled"])
def test_what_ids_hide_is_skipped(kind, causal):
    """Against the definition, of queries and of keys; of documents nothing is walked over for nothing, or masked."""
    rng = np.random.default_rng(3)
    ids = np.stack([documents(300, 10, 200, 37, 60, total=700), documents(512, total=700)])
    if kind == "shuffled":
        ids = rng.integers(0, 3, ids.shape)
    # Rows of a cache, whose queries stand somewhere among the keys.
    positions = np.arange(700) + np.array([[0], [150]]) if kind in ("positions", "both") else np.arange(700)[None]
    seen = np.ones((2, 700, 700), bool)
    if causal:
        seen &= np.arange(700) <= positions[:, :, None]
    names: dict[str, Any] = {}
    if kind != "positions":
        seen &= (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None]
        names |= {"q_segment_ids_BT": ids, "kv_segment_ids_BS": ids}
    if kind in ("positions", "both"):
        names |= {"q_positions_BT": positions, "kv_positions_BS": np.broadcast_to(np.arange(700), (2, 700))}
    mask = Mask(causal=causal, window=None if causal else (None, 1000), **jax.tree.map(jnp.asarray, names))
    for tiles, sees, fill in zip(
        walks(mask, 700, 128, 64), (seen, seen.swapaxes(1, 2)), (False, kind == "positions"), strict=True
    ):
        # Columns beyond the end: keys are hidden; what queries get does not matter.
        padded = np.pad(sees, ((0, 0), (0, 68), (0, 68)))
        padded[:, :, 700:] |= fill
        blocks = padded.reshape(2, 6, 128, 12, 64)
        for b, i in np.ndindex(2, 6):
            first, whole, partly, end = tiles[b, i]
            assert 0 <= first <= whole <= partly <= end <= 12
            rows = blocks[b, i, : 700 - i * 128]  # padded ones see what they like
            some, every = np.any(rows, axis=(0, 2)), np.all(rows, axis=(0, 2))
            assert set(np.flatnonzero(some)) <= set(range(first, end))
            assert every[whole:partly].all()
            if kind == "segments":
                assert some[first:end].all(), "a tile for nothing"
                assert every[first:end].sum() == partly - whole, "a mask for nothing"


def test_documents_cost_what_they_cost_alone():
    def walked(ids):
        ids = jnp.asarray(ids)[None]
        mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
        return [int((tiles[..., 3] - tiles[..., 0]).sum()) for tiles in walks(mask, ids.size, 128, 64)]

    alone = walked(documents(512, total=512))
    assert alone == [2 + 4 + 6 + 8] * 2
    assert walked(documents(*[512] * 8, total=4096)) == [8 * tiles for tiles in alone]
    assert walked(documents(512, total=4096)) == alone, "padding is not free"


def test_no_other_document_is_read(interpretable):
    """Tiles of keys that are no numbers would leave none in the results, if only as zero times themselves."""
    ids = jnp.asarray(documents(128, 70, 58, total=256))[None]
    mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)

    def attend(q, k, v):
        return flash_attention(q, k, v, scale=0.1, mask=mask, implementation="gpu", return_lse=True)

    def run(q, k, v):
        results, vjp = jax.vjp(attend, q, k, v)
        return *results, *vjp(jax.tree.map(jnp.ones_like, results))

    draw = jax.random.normal(jax.random.key(0), (3, 1, 256, 1, 64), jnp.bfloat16)
    q, k, v = jnp.where((ids == 1)[None, :, :, None, None], jnp.nan, draw)
    for name, a in zip(("out", "lse", "dq", "dk", "dv"), jax.jit(run)(q, k, v), strict=True):
        a = np.asarray(a, np.float32)
        assert np.isnan(a[:, :128]).all() and not np.isnan(a[:, 128:]).any(), name


def test_transposed_band_is_the_same_one():
    band = Band(low=-5, high=3, num_queries=20, num_keys=30)
    for query, key in np.ndindex(20, 30):
        other = band.transposed
        assert (query + band.low <= key < query + band.high) == (key + other.low <= query < key + other.high)


def test_what_the_chip_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="registers a thread"):
        gpu.Tile(keys=256, stages=2, qk_width=64, v_width=256)
    with pytest.raises(ValueError, match="shared memory"):
        gpu.Tile(keys=128, stages=3, qk_width=192, v_width=128)
    with pytest.raises(ValueError, match="keys must be"):
        gpu.Tile(keys=96, stages=2, qk_width=64, v_width=64)
    with pytest.raises(ValueError, match="cannot sum 512 columns"):
        gpu.Tile(keys=64, stages=2, qk_width=64, v_width=512)
    with pytest.raises(ValueError, match="rows must be"):
        gpu_backward.BackwardTile(rows=96, stages=1, sums=(((),),))
    with pytest.raises(Unsupported, match=r"no backward pass for widths 256 and 256.*'xla' takes every width"):
        gpu_backward.BackwardTile(rows=64, stages=4, sums=(((),),)).check(256, 256)
    assert WARPGROUPS * REGISTERS + PRODUCER_REGISTERS <= 3 * 168


WIDTHS = [*range(64, 257, 32), 320, 384, 448, 512, 576]


def test_there_is_a_tile_for_all_widths():
    for widths in itertools.product(WIDTHS, WIDTHS[:-1]):
        K, U = (a.shape[0] for a in pad_widths(*(jnp.zeros(width, jnp.bfloat16) for width in widths)))
        gpu.choose(K, U)  # checks itself
        gpu_backward.choose_dq(K, U).check(K, U)
        for tile in gpu_backward.choose_dk_dv(K, U):
            tile.check(K, U)


@pytest.mark.parametrize("width", WIDTHS)
def test_both_warpgroups_together_sum_all_columns(width):
    all_pieces = [piece for half in halves(width) for piece in half]
    assert [column for piece in all_pieces for column in range(piece.start, piece.stop)] == list(range(width))
    assert all(0 < p.stop - p.start <= WIDEST_PRODUCT and p.start % 32 == 0 for p in all_pieces)


def test_what_it_lacks_is_said():
    def call(width: Any = 64, v_width: Any = 64, dtype: Any = jnp.bfloat16, scale: Any = 0.1, **mask: Any):
        q, v = jnp.zeros((1, 8, 1, width), dtype), jnp.zeros((1, 8, 1, v_width), dtype)
        flash_attention(q, q, v, scale=scale, mask=Mask(**mask), implementation="gpu")

    for options, said in (
        ({"dtype": jnp.float32}, "no float32"),
        ({"width": 704, "v_width": 512}, "no tile for widths 704 and 512; 'xla' takes every width"),
        ({"selected_BTS": jnp.ones((1, 8, 8), bool)}, "no masks by selection"),
        ({"scale": 0.0}, "positive scale"),
    ):
        with pytest.raises(Unsupported, match=said):
            call(**options)
