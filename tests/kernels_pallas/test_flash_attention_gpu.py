"""The Hopper kernels of attention on a simulated chip against the equation in float64. That they compile is in test_aot.py."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from harness import interpreted
from test_flash_attention import ADVERSARIAL, Case, all_pairs, check_bfloat16

from kernels_pallas import Mask, Unsupported, flash_attention
from kernels_pallas.flash_attention import gpu, gpu_backward
from kernels_pallas.flash_attention.hopper import (
    PRODUCER_REGISTERS,
    REGISTERS,
    SHARED_MEMORY,
    WARPGROUPS,
    Band,
)

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
    "one query": Case(dims=(64, 64), heads=(2, 1), lengths=(1, 330), causal=True, offset=329),
    "nothing hidden": Case(dims=(64, 64), heads=(1, 1), lengths=(128, 192)),
}
EVERY_TIME = {"causal, grouped", "wide keys, a window, softcap and sinks", "queries before all keys, segments"}


def some_slow(cases, every_time):
    return [name if name in every_time else pytest.param(name, marks=pytest.mark.slow) for name in cases]


@pytest.fixture
def interpretable(monkeypatch):
    """Tiles small enough for several of them, with what the interpreter can run."""

    def through_shared_memory(choose):
        return lambda *widths: dataclasses.replace(choose(*widths), in_shared_memory=True)

    monkeypatch.setattr(
        gpu, "choose", through_shared_memory(lambda K, U: gpu.Tile(keys=64, stages=2, qk_width=K, v_width=U))
    )
    for name in ("choose_dq", "choose_dk_dv"):
        monkeypatch.setattr(gpu_backward, name, through_shared_memory(getattr(gpu_backward, name)))
    with interpreted("gpu"):
        yield


@pytest.mark.parametrize("name", some_slow(CASES, EVERY_TIME))
def test_over_several_tiles(name, interpretable):
    check_bfloat16(CASES[name], "gpu")


EDGES = [name for name, case in ADVERSARIAL.items() if not case.selected and not case.positions]


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
        if max(case.dims) <= 256:
            yield pytest.param(case, id=name, marks=[rounded] if name == "(128, 128)-(8, 2)" else [])


@pytest.mark.slow
@pytest.mark.parametrize("case", list(features_in_pairs()))
def test_features_in_pairs(case, interpretable):
    check_bfloat16(case, "gpu")


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
    with pytest.raises(ValueError, match="rows must be"):
        gpu_backward.BackwardTile(rows=32)
    with pytest.raises(ValueError, match="shared memory"):
        gpu_backward.BackwardTile(stages=4).check(256, 256)
    assert WARPGROUPS * REGISTERS + PRODUCER_REGISTERS <= 3 * 168


def test_there_is_a_tile_for_all_widths():
    for K in range(64, 257, 64):
        for U in range(64, 257, 64):
            assert gpu.choose(K, U).shared_memory <= SHARED_MEMORY
            gpu_backward.choose_dq(K, U).check(K, U)
            for extras in (False, True):
                gpu_backward.choose_dk_dv(K, U, extras).check(K, U)


def test_what_it_lacks_is_said():
    def call(width: Any = 64, v_width: Any = 64, dtype: Any = jnp.bfloat16, scale: Any = 0.1, **mask: Any):
        q, v = jnp.zeros((1, 8, 1, width), dtype), jnp.zeros((1, 8, 1, v_width), dtype)
        flash_attention(q, q, v, scale=scale, mask=Mask(**mask), implementation="gpu")

    ids = jnp.zeros((1, 8), jnp.int32)
    for options, said in (
        ({"dtype": jnp.float32}, "no float32"),
        ({"width": 576, "v_width": 512}, "no widths above 256"),
        ({"q_positions_BT": ids, "kv_positions_BS": ids, "causal": True}, "no masks by positions"),
        ({"selected_BTS": jnp.ones((1, 8, 8), bool)}, "no masks by selection"),
        ({"scale": 0.0}, "positive scale"),
    ):
        with pytest.raises(Unsupported, match=said):
            call(**options)
