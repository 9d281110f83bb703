"""Products of block-scaled FP8, every implementation against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from harness import Case, ways

from kernels_pallas import Unsupported, fp8
from kernels_pallas.fp8 import Fp8Array
from kernels_pallas.fp8_gemm import fp8_grouped_gemm, fp8_matmul
from kernels_pallas.fp8_gemm.api import BACK_ENDS

# name: (rows, D, F, group sizes)
SIZES = {
    "ragged": (70, 128, 128, [7, 30, 3, 21]),
    "several blocks, partial ones": (40, 300, 200, [0, 25, 0, 15]),
    "one group has everything": (150, 256, 130, [0, 150]),
    "nothing at all": (16, 128, 40, [0, 0]),
    "groups of nearly a tile": (400, 384, 136, [127, 0, 129, 1, 128, 5]),
}


def inputs(rows, d, f, sizes, powers_of_two=True):
    """e4m3 data of all magnitudes and scales that differ by block; NaN beyond the last group."""
    rng = np.random.default_rng(0)

    def scale(*shape):
        exponent = rng.integers(-6, 3, shape)
        return np.ldexp(np.float32(1) if powers_of_two else rng.uniform(1, 2, shape).astype(np.float32), exponent)

    def data(*shape):
        return (rng.standard_normal(shape) * 30).astype(ml_dtypes.float8_e4m3fn)

    x, w = data(rows, d), data(len(sizes), f, d)
    x[sum(sizes) :] = np.nan
    x_scale = scale(rows, -(-d // 128)).astype(np.float32)
    w_scale = scale(len(sizes), -(-f // 128), -(-d // 128)).astype(np.float32)
    return x, x_scale, w, w_scale, np.array(sizes, np.int32)


CASES = [Case(name=name, args=functools.partial(inputs, *sizes)) for name, sizes in SIZES.items()]
ANY_SCALES = Case(name="scales of any kind", args=functools.partial(inputs, 70, 300, 136, [7, 30, 3, 21], False))


def values(x, x_scale, w, w_scale):
    """What the arrays stand for, in float64."""
    x_scale = np.repeat(x_scale.astype(np.float64), 128, -1)[:, : x.shape[1]]
    w_scale = np.repeat(np.repeat(w_scale.astype(np.float64), 128, -1), 128, -2)[:, : w.shape[1], : w.shape[2]]
    return x.astype(np.float64) * x_scale, w.astype(np.float64) * w_scale


def product(x, w, sizes):
    y, start = np.zeros((len(x), w.shape[1])), 0
    for e, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size] @ w[e].T
        start += size
    return y


def run(x, x_scale, w, w_scale, sizes, dtype, implementation):
    x, w = Fp8Array(x, x_scale, (1, 128)), Fp8Array(w, w_scale, (128, 128))
    return fp8_grouped_gemm(x, w, sizes, dtype=dtype, implementation=implementation)


def check(case, way, dtype, rounding=0.0, sums=2**-20):
    """Half an ulp of the result beside errors relative to the terms' magnitudes, of operands' `rounding` and of `sums`."""
    x, x_scale, w, w_scale, sizes = case.args()
    actual = way.run(functools.partial(run, dtype=dtype), x, x_scale, w, w_scale, sizes)
    x64, w64 = values(x, x_scale, w, w_scale)
    truth, magnitude = product(x64, w64, sizes), product(abs(x64), abs(w64), sizes)
    assert actual.dtype == dtype and actual.shape == truth.shape
    error = abs(np.asarray(actual, np.float64) - truth)
    assert np.all(error <= float(jnp.finfo(dtype).eps) / 2 * abs(truth) + (rounding + sums) * magnitude), error.max()


@pytest.mark.parametrize("way", ways("reference", "xla"), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, way):
    check(case, way, jnp.float32)
    check(case, way, jnp.bfloat16)


@pytest.mark.parametrize("way", ways("reference", "xla"), ids=str)
def test_scales_of_any_kind(way):
    """The plain form rounds operands to the dtype of the result."""
    check(ANY_SCALES, way, jnp.bfloat16, rounding=2**-8 if way.implementation == "xla" else 0)


def test_dense_is_one_group():
    x, x_scale, w, w_scale, _ = inputs(40, 300, 200, [40])
    dense = fp8_matmul(
        *(
            Fp8Array(jnp.asarray(a), jnp.asarray(s), b)
            for a, s, b in ((x, x_scale, (1, 128)), (w[0], w_scale[0], (128, 128)))
        )
    )
    x64, w64 = values(x, x_scale, w, w_scale)
    np.testing.assert_allclose(np.asarray(dense, np.float64), x64 @ w64[0].T, rtol=2**-8, atol=1)


def test_quantized_values_are_multiplied():
    """From the public formats to a product, within DeepGEMM's bound for what quantizing costs."""
    keys = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(keys[0], (33, 256)), jax.random.normal(keys[1], (2, 140, 256))
    sizes = jnp.array([20, 13])
    y = fp8_grouped_gemm(fp8.quantize_activations(x), fp8.quantize_weights(w), sizes, dtype=jnp.float32)
    truth = product(np.asarray(x, np.float64), np.asarray(w, np.float64), sizes)
    assert 1 - 2 * np.sum(y * truth) / np.sum(np.square(y) + truth**2) < 1e-3


def test_scales_may_be_stored_as_powers_of_two():
    x, x_scale, w, w_scale, sizes = (jnp.asarray(a) for a in inputs(*SIZES["ragged"]))
    stored = [scale.astype(jnp.float8_e8m0fnu) for scale in (x_scale, w_scale)]
    got = run(x, stored[0], w, stored[1], sizes, jnp.float32, "xla")
    np.testing.assert_array_equal(got, run(x, x_scale, w, w_scale, sizes, jnp.float32, "xla"))


def test_gradients_are_refused():
    x, x_scale, w, w_scale, sizes = (jnp.asarray(a) for a in inputs(*SIZES["ragged"]))
    with pytest.raises(TypeError, match="fp8_grouped_gemm is not differentiable"):
        jax.grad(lambda x_scale: run(x, x_scale, w, w_scale, sizes, jnp.float32, None).sum())(x_scale)


def test_refuses_what_does_not_fit():
    x, w = fp8.quantize_activations(jnp.ones((4, 300))), fp8.quantize_weights(jnp.ones((2, 5, 300)))
    sizes = jnp.array([2, 2])
    with pytest.raises(ValueError, match=r"needs x \[M, D\]"):
        fp8_grouped_gemm(fp8.quantize_activations(jnp.ones((4, 200))), w, sizes)
    with pytest.raises(ValueError, match=r"needs x in float8_e4m3fn with scales \(4, 3\) of blocks \(1, 128\)"):
        fp8_grouped_gemm(fp8.quantize_weights(jnp.ones((4, 300))), w, sizes)
    with pytest.raises(ValueError, match=r"needs w in float8_e4m3fn with scales \(2, 1, 3\)"):
        fp8_grouped_gemm(x, Fp8Array(w.data, w.scale[:1], w.block), sizes)
    with pytest.raises(ValueError, match="2 integer group sizes"):
        fp8_grouped_gemm(x, w, jnp.array([4]))
    with pytest.raises(ValueError, match="gives bfloat16, float16 or float32, not int8"):
        fp8_grouped_gemm(x, w, sizes, dtype=jnp.int8)
    with pytest.raises(Unsupported, match="no implementation 'triton'"):
        fp8_grouped_gemm(x, w, sizes, implementation="triton")  # pyright: ignore
    assert next(iter(BACK_ENDS)) == "xla", "no kernel has been timed on a device"
