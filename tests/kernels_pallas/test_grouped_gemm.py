import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Unsupported, grouped_gemm

# name: (rows, D, F, group sizes)
CASES = {
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
}
IMPLEMENTATIONS = ["reference", "xla"]


def inputs(name):
    rows, d, f, sizes = CASES[name]
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((rows, d)), rng.standard_normal((rows, f))
    return x, rng.standard_normal((len(sizes), d, f)), np.array(sizes, np.int32), dy


def expected(x, w, sizes, dy):
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(sizes):
        mine = slice(start, start + size)
        y[mine], dx[mine], dw[e] = x[mine] @ w[e], dy[mine] @ w[e].T, x[mine].T @ dy[mine]
        start += size
    return y, dx, dw


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation):
    x, w, sizes, dy = inputs(name)
    as32 = [jnp.asarray(a, jnp.float32) for a in (x, w)]

    @jax.jit
    def run(x, w, sizes, dy):
        y, vjp = jax.vjp(lambda x, w: grouped_gemm(x, w, sizes, implementation=implementation), x, w)
        return y, *vjp(dy)

    got = run(*as32, jnp.asarray(sizes), jnp.asarray(dy, jnp.float32))
    for actual, wanted in zip(got, expected(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-5)


def test_bfloat16_accumulates_in_float32():
    sizes = jnp.array([2, 2], jnp.int32)
    x = jnp.ones((4, 1000), jnp.bfloat16)
    y = grouped_gemm(x, jnp.ones((2, 1000, 8), jnp.bfloat16), sizes)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1000.0)


def test_refuses_what_does_not_fit():
    x, w = jnp.ones((4, 3)), jnp.ones((2, 3, 5))
    with pytest.raises(ValueError, match="needs x"):
        grouped_gemm(jnp.ones((4, 2)), w, jnp.array([2, 2]))
    with pytest.raises(ValueError, match="2 integer group sizes"):
        grouped_gemm(x, w, jnp.array([2, 2, 0]))
    with pytest.raises(Unsupported, match="no implementation 'triton'"):
        grouped_gemm(x, w, jnp.array([2, 2]), implementation="triton")  # pyright: ignore
