"""Grouped products, every implementation against NumPy in float64: values and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Case, ways
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import Unsupported, grouped_gemm
from kernels_pallas.grouped_gemm import xla
from kernels_pallas.grouped_gemm.api import BACK_ENDS

# name: (rows, D, F, group sizes)
SIZES = {
    "equal": (64, 8, 6, [16, 16, 16, 16]),
    "ragged": (61, 8, 6, [7, 30, 3, 21]),
    "rows beyond the sum": (64, 5, 7, [10, 0, 20, 4]),
    "empty groups": (40, 8, 6, [0, 20, 0, 0, 20, 0]),
    "one group has everything": (600, 8, 6, [0, 600, 0, 0]),
    "overflow of several blocks": (900, 4, 3, [300, 10, 580, 10]),
    "nothing at all": (16, 4, 3, [0, 0, 0]),
    "single row": (1, 4, 3, [1]),
    "fewer rows than groups": (3, 4, 3, [0, 2, 0, 0, 1, 0]),
    "one group": (24, 4, 3, [20]),
    "no rows": (0, 4, 3, [0, 0]),
    # Around what kernels take at once, 64 or 128 of each: groups end before, on and behind an edge.
    "tiles: groups of nearly a tile": (400, 72, 136, [127, 0, 129, 1, 128, 5]),
    "tiles: many columns, ragged contraction": (70, 200, 300, [3, 60]),
}


def inputs(rows, d, f, sizes):
    """x, w, sizes and dy; NaN beyond the last group, where nothing may be read."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(shape) for shape in ((rows, d), (len(sizes), d, f), (rows, f)))
    x[sum(sizes) :] = np.nan
    dy[sum(sizes) :] = np.nan
    return x, w, np.array(sizes, np.int32), dy


CASES = [Case(name=name, args=functools.partial(inputs, *sizes)) for name, sizes in SIZES.items()]


def expected(x, w, sizes, dy):
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(sizes):
        mine = slice(start, start + size)
        y[mine], dx[mine], dw[e] = x[mine] @ w[e], dy[mine] @ w[e].T, x[mine].T @ dy[mine]
        start += size
    return y, dx, dw


def products(x, w, sizes, dy, implementation):
    y, vjp = jax.vjp(lambda x, w: grouped_gemm(x, w, sizes, implementation=implementation), x, w)
    return y, *vjp(dy)


def check(case, way, dtype, rtol):
    x, w, sizes, dy = case.args()
    x, w, dy = (np.asarray(jnp.asarray(a, dtype)) for a in (x, w, dy))
    x64, w64, dy64 = x.astype(np.float64), w.astype(np.float64), dy.astype(np.float64)
    got, wanted = way.run(products, x, w, sizes, dy), expected(x64, w64, sizes, dy64)
    # What errors of summation are relative to: the sum of the terms' magnitudes.
    magnitudes = expected(abs(x64), abs(w64), sizes, abs(dy64))
    for name, actual, truth, magnitude in zip(("y", "dx", "dw"), got, wanted, magnitudes, strict=True):
        assert actual.dtype == dtype and actual.shape == truth.shape, name
        error = abs(np.asarray(actual, np.float64) - truth)
        assert np.all(error <= rtol * abs(truth) + 2**-20 * magnitude), (name, error.max())


@pytest.mark.parametrize("way", ways("reference", "xla"), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, way):
    check(case, way, jnp.float32, rtol=2**-22)


@pytest.mark.parametrize("way", ways("reference", "xla"), ids=str)
def test_bfloat16_rounds_once(way):
    """Half an ulp of the result beside errors of sums in float32."""
    for name in ("ragged", "tiles: groups of nearly a tile"):
        check(Case(name=name, args=functools.partial(inputs, *SIZES[name])), way, jnp.bfloat16, rtol=2**-8)


def test_bfloat16_accumulates_in_float32():
    sizes = jnp.array([2, 2], jnp.int32)
    x = jnp.ones((4, 1000), jnp.bfloat16)
    y = grouped_gemm(x, jnp.ones((2, 1000, 8), jnp.bfloat16), sizes)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1000.0)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, w, sizes, dy = inputs(*SIZES["overflow of several blocks"])
        got = products(*map(jnp.asarray, (x, w, sizes, dy)), implementation="xla")
        for actual, truth in zip(got, expected(x, w, sizes, dy), strict=True):
            assert actual.dtype == jnp.float64
            np.testing.assert_allclose(actual, truth, rtol=1e-12, atol=1e-12)


def test_one_group_is_as_if_the_others_were_not_there():
    """Whatever another group's rows hold, NaN included."""
    x, w, sizes, dy = (jnp.asarray(a) for a in inputs(*SIZES["overflow of several blocks"]))
    poisoned = [a.at[300:310].set(jnp.nan) for a in (x, dy)]
    y, dx, dw = products(poisoned[0], w, sizes, poisoned[1], "xla")
    wanted = products(x, w, sizes, dy, "xla")
    for actual, truth in ((y, wanted[0]), (dx, wanted[1])):
        np.testing.assert_array_equal(
            jnp.delete(actual, jnp.arange(300, 310), 0), jnp.delete(truth, jnp.arange(300, 310), 0)
        )
    np.testing.assert_array_equal(jnp.delete(dw, 1, 0), jnp.delete(wanted[2], 1, 0))


def test_back_ends_have_each_product_alone():
    x, w, sizes, dy = (jnp.asarray(a, jnp.float32 if a.dtype == float else a.dtype) for a in inputs(*SIZES["ragged"]))
    y, dx, dw = products(x, w, sizes, dy, "xla")
    np.testing.assert_array_equal(xla.forward(x, w, sizes), y)
    np.testing.assert_array_equal(xla.backward_rows(dy, w, sizes), dx)
    np.testing.assert_array_equal(xla.backward_weights(x, dy, sizes, w.dtype), dw)
    assert next(iter(BACK_ENDS)) == "xla", "no kernel has been timed on a device"


def check_inside_shard_map(implementation):
    """Rows and loads vary, matrices do not: their gradient is the sum over devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    x, w, _, dy = (jnp.asarray(a, jnp.float32) for a in inputs(122, 8, 6, [120, 1, 1, 0]))
    sizes = jnp.array([7, 30, 3, 21, 0, 0, 50, 1], jnp.int32)

    def sharded(x, w):
        local = functools.partial(grouped_gemm, implementation=implementation)
        return jax.shard_map(local, in_specs=(P("data"), P(), P("data")), out_specs=P("data"))(
            x, w, jax.device_put(sizes, P("data"))
        )

    with jax.set_mesh(mesh):
        y, vjp = jax.vjp(sharded, jax.device_put(x, P("data")), jax.device_put(w, P()))
        dx, dw = vjp(jax.device_put(dy, P("data")))
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    halves = [
        expected(x64[rows], w64, np.asarray(sizes[loads]), dy64[rows])
        for rows, loads in ((slice(0, 61), slice(0, 4)), (slice(61, None), slice(4, None)))
    ]
    error = 2**-23  # of some 50 terms of about 1
    for actual, truth in (
        (y, np.concatenate([half[0] for half in halves])),
        (dx, np.concatenate([half[1] for half in halves])),
        (dw, halves[0][2] + halves[1][2]),
    ):
        np.testing.assert_allclose(np.asarray(actual, np.float64), truth, rtol=2 * error, atol=50 * error)


@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"])
def test_inside_shard_map(implementation):
    check_inside_shard_map(implementation)


def test_refuses_what_does_not_fit():
    x, w = jnp.ones((4, 3)), jnp.ones((2, 3, 5))
    with pytest.raises(ValueError, match="needs x"):
        grouped_gemm(jnp.ones((4, 2)), w, jnp.array([2, 2]))
    with pytest.raises(ValueError, match="needs x"):
        grouped_gemm(jnp.ones((4, 0)), jnp.ones((2, 0, 5)), jnp.array([2, 2]))
    with pytest.raises(ValueError, match="2 integer group sizes"):
        grouped_gemm(x, w, jnp.array([2, 2, 0]))
    with pytest.raises(Unsupported, match="no implementation 'triton'"):
        grouped_gemm(x, w, jnp.array([2, 2]), implementation="triton")  # pyright: ignore
