"""The Hopper kernels of the grouped products on a simulated chip. That they compile is in test_aot.py."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Way, interpreted
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_grouped_gemm import CASES, check, expected, inputs

from kernels_pallas import Unsupported, grouped_gemm
from kernels_pallas.grouped_gemm import gpu, turns
from kernels_pallas.grouped_gemm.gpu import Tile
from kernels_pallas.grouped_gemm.shapes import SHAPES
from kernels_pallas.grouped_gemm.turns import TILE_ROWS, Visits

HERE, THERE = (Way(implementation="gpu", where=where) for where in ("interpreted", "device"))
EVERY_TIME = {"tiles: groups of nearly a tile"}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several of each dim, several turns, places in the ring used again, and what the interpreter can run."""
    monkeypatch.setattr(gpu, "choose", lambda columns: Tile(columns=min(columns, 128), stages=2))
    monkeypatch.setattr(turns, "BLOCKS", 2)
    monkeypatch.setattr(turns, "put", lambda ref, y: operator.setitem(ref, ..., y))


@pytest.mark.parametrize(
    "case", [c if str(c) in EVERY_TIME else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids=str
)
def test_over_several_tiles(case, small_tiles):
    """Half an ulp of the result beside errors of sums in float32."""
    check(case, HERE, jnp.bfloat16, rtol=2**-8)


@pytest.mark.device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_chip(case):
    check(case, THERE, jnp.bfloat16, rtol=2**-8)


@pytest.mark.slow
def test_nothing_of_other_groups_is_multiplied(small_tiles):
    """NaN in one group's rows, which are loaded with others'."""
    x, w, sizes, dy = inputs(200, 64, 64, [100, 10, 90])
    wanted = expected(x, w, sizes, dy)
    x[100:110] = dy[100:110] = np.nan
    x, w, dy, sizes = *(jnp.asarray(a, jnp.float16) for a in (x, w, dy)), jnp.asarray(sizes)
    with interpreted("gpu"):
        got = jax.jit(gpu.forward)(x, w, sizes), jax.jit(gpu.backward_rows)(dy, w, sizes)
        dw = jax.jit(gpu.backward_weights, static_argnums=3)(x, dy, sizes, w.dtype)
    for y, truth in zip(got, wanted, strict=False):
        y, truth = (np.delete(a, np.arange(100, 110), 0) for a in (y, truth))
        np.testing.assert_allclose(y, truth, atol=0.1)
    np.testing.assert_allclose(np.delete(dw, 1, 0), np.delete(wanted[2], 1, 0), atol=0.1)


def test_lowers_inside_shard_map():
    """Values and both gradients; matrices are the same on all devices, rows are not."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])

    def gradients(x, w, sizes, dy):
        return jax.vjp(lambda x, w: grouped_gemm(x, w, sizes, implementation="gpu"), x, w)[1](dy)

    with jax.set_mesh(mesh):
        rows, all_ = jax.NamedSharding(mesh, P("data")), jax.NamedSharding(mesh, P())
        x, dy = (jax.ShapeDtypeStruct((256, width), jnp.bfloat16, sharding=rows) for width in (64, 128))
        w = jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16, sharding=all_)
        sizes = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=rows)
        specs = P("data"), P(), P("data"), P("data")
        local = jax.jit(jax.shard_map(gradients, in_specs=specs, out_specs=specs[:2]))
        assert "mosaic_gpu" in local.trace(x, w, sizes, dy).lower(lowering_platforms=("cuda",)).as_text()


def test_visits():
    """Every row of every group is in just one tile, and all others in tiles of group E."""
    rng = np.random.default_rng(0)
    for number in range(40):
        groups, rows = ((1, 200), (3, 128), (5, 700), (6, 512))[number % 4]  # few: every shape is compiled
        sizes = rng.multinomial(rng.integers(0, rows + 1), rng.dirichlet(np.full(groups, 0.5)))
        visits = Visits.of(jnp.asarray(sizes, jnp.int32), rows)
        (count,) = visits.count.tolist()
        assert count <= visits.group_V.size
        found = np.full(rows, -1)
        places = zip(*(a.tolist()[:count] for a in (visits.group_V, visits.row_V, visits.end_V)), strict=True)
        for group, row, end in places:
            tile = slice(row, min(end, row + TILE_ROWS))
            assert tile.stop > row and (found[tile] == -1).all()
            found[tile] = group
        np.testing.assert_array_equal(found, np.repeat(np.arange(groups + 1), [*sizes, rows - sizes.sum()]))


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_at_production_shapes(name):
    """As wide as can be: few columns of a tile are computed for nothing or twice."""
    for columns in (SHAPES[name].inner, SHAPES[name].outer):
        tile = gpu.choose(columns)
        assert tile.columns == 256 and -(-columns // 256) * 256 <= 1.15 * columns


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="columns must be 64, 128, 192 or 256"):
        Tile(columns=100)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        Tile(columns=256, stages=5)


def test_declines_other_dtypes():
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([2, 2])
    with pytest.raises(Unsupported, match="takes bfloat16 or float16, not float32 and float32; 'xla' does"):
        grouped_gemm(x, w, sizes, implementation="gpu")
