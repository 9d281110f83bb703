"""bfloat16: no worse than NumPy that rounds every result to bfloat16; float32 where the configuration promises it."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_model
import pytest
from models import BATCH, QWEN, V3, parameters, pure, result

from mdl.precision import PrecisionConfig

BF16 = PrecisionConfig(compute="bfloat16")
# Without experts: two orders of rounding may choose other experts, which is no error but no rounding either.
DENSE = {
    "mla": dataclasses.replace(V3, moe=None, mtp=None, num_hidden_layers=2),
    "gqa": dataclasses.replace(QWEN, moe=None, mtp=None),
}


class Rounded(np.ndarray):
    """An array whose every operation rounds its result to bfloat16: the plain low-precision computation."""

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        kwargs.pop("out", None)  # an in-place sum is bound to its result again
        plain = [x.view(np.ndarray) if isinstance(x, Rounded) else x for x in inputs]
        result = np.asarray(getattr(ufunc, method)(*plain, **kwargs))
        if result.dtype == np.float64:
            result = result.astype(ml_dtypes.bfloat16).astype(np.float64)
        return result.view(Rounded)


def hidden(config, tree, tokens):
    return np.asarray(numpy_model.hidden(tokens, tree["params"], tree["buffers"], config, numpy_model.Reports()))


@pytest.mark.parametrize("name", DENSE)
def test_bfloat16_is_as_good_as_plain_bfloat16(name):
    """At most twice the error of the plain computation against a float64 truth, in the mean over all positions."""
    config = dataclasses.replace(DENSE[name], precision=BF16)
    tree, tokens = parameters(DENSE[name]), BATCH["tokens"][0, :4, :-1]
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    @jax.jit
    def run(tree):
        model = pure(config).merge(tree["params"], tree["buffers"])
        return model(tokens, positions, jnp.ones_like(tokens)).hidden_BTD

    got_BTD = run(tree)
    assert got_BTD.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float64).view(Rounded), tree)
    truth = np.stack([hidden(config, wide, row) for row in tokens])
    plain = np.stack([hidden(config, rounded, row) for row in tokens])
    error, allowed = (np.sqrt(np.mean((np.asarray(x, np.float64) - truth) ** 2)) for x in (got_BTD, plain))
    assert allowed > 1e-4  # the plain computation did round
    assert error <= 2 * allowed


def test_bfloat16_trains_all_parts():
    """Experts and MTP in bfloat16: the loss within a few roundings of float32, gradients finite and in float32."""
    grads, terms = result(dataclasses.replace(V3, precision=BF16))
    _, want = result(V3)
    for path, leaf in grads.items():
        assert leaf.dtype == np.float32 and np.all(np.isfinite(leaf)), path
    assert terms.loss.dtype == jnp.float32
    # A bfloat16 has 8 bits: 2^-8 of logits of size 10, averaged over targets, and some tokens choose other experts.
    np.testing.assert_allclose(terms.loss, want.loss, rtol=0.05)


def test_router_and_logits_are_float32():
    config = dataclasses.replace(V3, precision=BF16)
    tree = parameters(V3)

    def run(tree):
        model = pure(config).merge(tree["params"], tree["buffers"])
        hidden_BTD = jnp.zeros((1, 4, V3.hidden_size), jnp.bfloat16)
        routing = model.mtp["0"].block.mlp.router(hidden_BTD)
        return model.logits(hidden_BTD), routing.weight_BTX, routing.balance_loss

    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(run, tree))} == {jnp.dtype("float32")}
