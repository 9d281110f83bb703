"""The TPU kernels of the grouped products on a simulated chip. That they compile is in test_aot.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Way, interpreted
from test_grouped_gemm import CASES, check, check_inside_shard_map, expected, inputs

from kernels_pallas import Unsupported, grouped_gemm
from kernels_pallas.grouped_gemm import tpu
from kernels_pallas.grouped_gemm.shapes import SHAPES
from kernels_pallas.grouped_gemm.tpu import Tile
from kernels_pallas.grouped_gemm.tpu_walk import BUFFER_BYTES, VMEM_BYTES, Visits

HERE, THERE = (Way(implementation="tpu", where=where) for where in ("interpreted", "device"))
EVERY_TIME = {"rows beyond the sum", "tiles: groups of nearly a tile", "tiles: many columns, ragged contraction"}


def some_slow(every_time):
    return [case if str(case) in every_time else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several of each dim."""
    for choose in ("choose", "choose_weights"):
        monkeypatch.setattr(tpu, choose, lambda *_: Tile(rows=128, inner=128, columns=128))


@pytest.mark.parametrize("case", some_slow(EVERY_TIME), ids=str)
def test_over_several_tiles(case, small_tiles):
    check(case, HERE, jnp.float32, rtol=2**-22)


@pytest.mark.parametrize("case", some_slow({"ragged"}), ids=str)
def test_rounds_once(case):
    check(case, HERE, jnp.bfloat16, rtol=2**-8)


@pytest.mark.device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_chip(case):
    check(case, THERE, jnp.bfloat16, rtol=2**-8)


def test_inside_shard_map():
    with interpreted("tpu"):
        check_inside_shard_map("tpu")


@pytest.mark.slow
def test_nothing_of_other_groups_is_multiplied(small_tiles):
    """NaN in one group's rows, which share tiles with others'."""
    sizes = [100, 10, 90]
    x, w, sizes, dy = inputs(200, 8, 6, sizes)
    wanted = expected(x, w, sizes, dy)
    x[100:110] = dy[100:110] = np.nan
    x, w, dy, sizes = *(jnp.asarray(a, jnp.float32) for a in (x, w, dy)), jnp.asarray(sizes)
    with interpreted("tpu"):
        got = jax.jit(tpu.forward)(x, w, sizes), tpu.backward_rows(dy, w, sizes)
        dw = tpu.backward_weights(x, dy, sizes, w.dtype)
    for y, truth in zip(got, wanted, strict=False):
        y, truth = (np.delete(a, np.arange(100, 110), 0) for a in (y, truth))
        np.testing.assert_allclose(y, truth, atol=1e-5)
    np.testing.assert_allclose(np.delete(dw, 1, 0), np.delete(wanted[2], 1, 0), atol=1e-4)


@pytest.mark.parametrize("every_group", [False, True])
def test_visits(every_group):
    """Against the definition, for loads of all kinds."""
    rng = np.random.default_rng(0)
    for number in range(40):
        groups, rows = ((1, 9), (5, 37), (6, 64))[number % 3]  # few: every shape is compiled
        sizes = rng.multinomial(rng.integers(0, rows + 1), rng.dirichlet(np.full(groups, 0.5)))
        visits = Visits.of(jnp.asarray(sizes, jnp.int32), rows, 8, every_group)
        group_of_row = np.concatenate([np.repeat(np.arange(groups), sizes), np.full(rows - sizes.sum(), groups)])
        wanted = {(row // 8, group) for row, group in enumerate(group_of_row) if group < groups}
        if every_group:
            wanted |= {(None, group) for group in range(groups) if not sizes[group]}
        else:
            wanted |= {
                (tile, groups) for tile in range(-(-rows // 8)) if (group_of_row[tile * 8 :][:8] == groups).all()
            }
        pairs = list(zip(visits.tile_V.tolist(), visits.group_V.tolist(), strict=True))
        assert all(0 <= tile < -(-rows // 8) for tile, _ in pairs), "a block out of bounds"
        empty = [group for group in range(groups) if not sizes[group]]
        found = {(None, group) if every_group and group in empty else (tile, group) for tile, group in pairs}
        assert found == wanted
        repeated = len(pairs) - len(wanted)
        assert repeated >= 0 and len(set(pairs[len(pairs) - repeated - 1 :])) == 1, "only the last is repeated"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_the_smallest_vmem(name, itemsize):
    shape = SHAPES[name]
    for inner, columns in ((shape.inner, shape.outer), (shape.outer, shape.inner)):
        tile = tpu.choose(shape.rows, inner, columns, shape.groups, itemsize)
        operands = tile.inner * (tile.rows + tile.columns) + tile.rows * tile.columns
        assert 2 * itemsize * operands + 8 * tile.rows * tile.columns <= BUFFER_BYTES < VMEM_BYTES
        tile = tpu.choose_weights(shape.rows, inner, columns, shape.groups)
        operands = tile.rows * (tile.inner + tile.columns) + tile.inner * tile.columns
        assert 2 * itemsize * operands + 4 * tile.inner * tile.columns <= BUFFER_BYTES


def test_tiles_of_a_few_rows():
    assert tpu.choose(3, 4, 3, 6, 4).rows == 32, "whole registers, though there are fewer rows"
    assert tpu.choose(4096, 512, 512, 32, 2).rows == 128 and tpu.choose(4096, 512, 512, 2, 2).rows == 512


def test_declines_other_dtypes():
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5), jnp.bfloat16), jnp.array([2, 2])
    with pytest.raises(Unsupported, match="takes bfloat16 or float32, not float32 and bfloat16; 'xla' does"):
        grouped_gemm(x, w, sizes, implementation="tpu")
