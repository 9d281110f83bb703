import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import Unsupported, linear_cross_entropy

IMPLEMENTATIONS = ["reference", "xla"]
# name: (rows, D, V, weights, z_loss, chunk_size)
CASES = {
    "one chunk": (12, 5, 9, "ones", 0.0, 64),
    "chunks with a ragged tail": (31, 5, 9, "ones", 0.0, 8),
    "masked rows": (24, 5, 9, "mask", 0.0, 8),
    "every row masked": (9, 5, 9, "zeros", 0.1, 4),
    "z-loss and fractional weights": (20, 5, 9, "fractions", 0.01, 7),
    "single row": (1, 5, 9, "ones", 0.01, 8),
    "chunks of one row": (3, 5, 9, "ones", 0.0, 1),
    "vocabulary of one": (4, 5, 1, "ones", 0.1, 2),
}


def inputs(name):
    m, d, v, weights, z_loss, chunk = CASES[name]
    rng = np.random.default_rng(3)
    weight = {
        "ones": np.ones(m),
        "zeros": np.zeros(m),
        "mask": (np.arange(m) % 3 > 0).astype(float),
        "fractions": rng.random(m),
    }[weights]
    return rng.standard_normal((m, d)), rng.standard_normal((d, v)), rng.integers(0, v, m), weight, z_loss, chunk


def expected(x, w, target, weight, z_loss):
    logits = x @ w
    largest = logits.max(axis=1)
    lse = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    label = logits[np.arange(len(x)), target]
    dlogits = np.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None]
    dlogits[np.arange(len(x)), target] -= 1
    dlogits *= weight[:, None]
    loss = (weight * (lse - label + z_loss * lse**2)).sum()
    return loss, dlogits @ w.T, x.T @ dlogits, lse - label, lse, label == largest


@pytest.mark.parametrize("vocab_first", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation, vocab_first):
    x, w, target, weight, z_loss, chunk = inputs(name)

    def loss(x, w):
        loss, aux = linear_cross_entropy(
            x,
            w,
            jnp.asarray(target),
            jnp.asarray(weight, jnp.float32),
            z_loss=z_loss,
            chunk_size=chunk,
            vocab_first=vocab_first,
            implementation=implementation,
        )
        return 3 * loss, (loss, aux)

    w32 = jnp.asarray(w.T if vocab_first else w, jnp.float32)
    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (value, aux)), (dx, dw) = gradients(jnp.asarray(x, jnp.float32), w32)
    wanted_loss, wanted_dx, wanted_dw, nll, lse, correct = expected(x, w, target, weight, z_loss)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)  # noqa: E731
    close(value, wanted_loss)
    close(dx, 3 * wanted_dx)
    close(dw.T if vocab_first else dw, 3 * wanted_dw)
    close(aux.nll_M, nll)
    close(aux.lse_M, lse)
    np.testing.assert_array_equal(aux.correct_M, correct)
    # Without a gradient the loss takes another path.
    close(jax.jit(lambda x, w: loss(x, w)[1][0])(jnp.asarray(x, jnp.float32), w32), wanted_loss)


@pytest.mark.parametrize("vocab_first", [False, True])
def test_vocabulary_and_rows_split_over_a_mesh(vocab_first):
    x, w, target, weight, z_loss, _ = inputs("z-loss and fractional weights")
    w, target = np.concatenate([w, w[:, ::-1] + 0.1, -w[:, :2]], axis=1), target * 2
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    w_spec = P("tensor") if vocab_first else P(None, "tensor")

    def local(x, w, target, weight):
        w = jax.lax.pcast(w, "data", to="varying")
        loss, aux = linear_cross_entropy(
            x, w, target, weight, z_loss=z_loss, chunk_size=3, vocab_first=vocab_first, axis_name="tensor"
        )
        return jax.lax.psum(loss, "data"), aux.nll_M

    @jax.jit
    def run(x, w, target, weight):
        rows = P("data")
        sharded = jax.shard_map(local, in_specs=(rows, w_spec, rows, rows), out_specs=(P(), rows))
        return jax.value_and_grad(lambda x, w: sharded(x, w, target, weight), argnums=(0, 1), has_aux=True)(x, w)

    arrays = (x, w.T if vocab_first else w, target, weight)
    specs = (P("data"), w_spec, P("data"), P("data"))
    with jax.set_mesh(mesh):
        put = lambda a, s: jax.device_put(  # noqa: E731
            jnp.asarray(a, jnp.int32 if a.dtype == int else jnp.float32), jax.NamedSharding(mesh, s)
        )
        (loss, nll), (dx, dw) = run(*(put(a, s) for a, s in zip(arrays, specs, strict=True)))
    wanted = expected(x, w, target, weight, z_loss)
    for actual, truth in zip((loss, dx, dw.T if vocab_first else dw, nll), wanted[:4], strict=True):
        np.testing.assert_allclose(actual, truth, rtol=1e-4, atol=2e-5)


def test_all_logits_never_exist_together():
    x, w = jax.ShapeDtypeStruct((64, 4), jnp.float32), jax.ShapeDtypeStruct((4, 33), jnp.float32)

    def loss(x, w):
        return linear_cross_entropy(x, w, jnp.zeros(64, jnp.int32), jnp.ones(64), chunk_size=16)[0]

    assert "64x33" not in jax.jit(jax.grad(loss)).lower(x, w).as_text()


def test_refuses_what_does_not_fit():
    x, w, ids, ones = jnp.ones((4, 3)), jnp.ones((3, 7)), jnp.zeros(4, int), jnp.ones(4)
    with pytest.raises(ValueError, match=r"w \[V, D\]"):
        linear_cross_entropy(x, w, ids, ones, vocab_first=True)
    with pytest.raises(ValueError, match="targets and weights"):
        linear_cross_entropy(x, w, ids[:2], ones)
    with pytest.raises(ValueError, match="chunk_size = 0"):
        linear_cross_entropy(x, w, ids, ones, chunk_size=0)
    with pytest.raises(Unsupported, match="does not split"):
        linear_cross_entropy(x, w, ids, ones, axis_name="tensor", implementation="reference")
