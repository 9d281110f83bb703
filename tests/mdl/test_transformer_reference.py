"""Whole models against float64 NumPy: every term of the loss, the experts' loads, and the gradient of every parameter."""

import functools

import jax
import numpy as np
import numpy_model
import pytest
from models import BATCH, CONFIGS, leaves, parameters, pure

from mdl.loss import LossWeights, count_targets, loss_terms

MTP, BALANCE, Z = 0.5, 0.7, 0.05  # far larger than in training, so that no term hides behind the main one
# A float32 pass through a few layers of width 16: sums of some hundred roundings of 6e-8, amplified by the norms.
RTOL = 2e-5

every_config = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def computed(name: str):
    """(terms, gradients) of the model under test."""
    config = CONFIGS[name]
    tree, batch = parameters(config), {key: value[0] for key, value in BATCH.items()}
    counts = count_targets(BATCH["segment_ids"], config.mtp.num_nextn_predict_layers if config.mtp else 0)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params):
        model = pure(config).merge(params, tree["buffers"])
        terms = loss_terms(model, batch, LossWeights(MTP, BALANCE, Z), counts)
        return terms.loss, terms

    grads, terms = gradients(tree["params"])
    return jax.device_get(terms), leaves(grads)


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)


def expected(name: str, tree):
    return numpy_model.terms(CONFIGS[name], tree, BATCH, mtp=MTP, balance_weight=BALANCE, z=Z)


@every_config
def test_terms_and_loads(name):
    terms, _ = computed(name)
    want = expected(name, wide(parameters(CONFIGS[name])))
    for key in ("main", "mtp", "balance", "z", "loss"):
        np.testing.assert_allclose(getattr(terms, key), want[key], rtol=RTOL, err_msg=key)
    assert terms.loads.keys() == want["loads"].keys()
    for key, load in want["loads"].items():
        np.testing.assert_array_equal(terms.loads[key], load, err_msg=key)


@every_config
def test_gradient_of_every_parameter(name):
    """Central differences of the float64 reference along one random direction per parameter."""
    _, grads = computed(name)
    tree = wide(parameters(CONFIGS[name]))
    rng = np.random.default_rng(1)
    for path, leaf in leaves(tree["params"]).items():
        direction = rng.standard_normal(leaf.shape)
        direction /= np.linalg.norm(direction)
        values = []
        for step in (1e-5, -1e-5):
            moved = jax.tree_util.tree_map_with_path(
                lambda p, x, path=path, step=step, direction=direction: (
                    x + step * direction if jax.tree_util.keystr(p) == path else x
                ),
                tree["params"],
            )
            values.append(expected(name, {**tree, "params": moved})["loss"])
        want = (values[0] - values[1]) / 2e-5
        # The reference rounds at 1e-16 / 1e-5; the model at RTOL of the whole gradient, of which this is one projection.
        np.testing.assert_allclose(
            np.sum(grads[path] * direction),
            want,
            rtol=RTOL,
            atol=RTOL * np.linalg.norm(grads[path]) + 1e-9,
            err_msg=path,
        )
        assert np.linalg.norm(grads[path]) > 0, path
