"""Whole models against float64 NumPy: every term of the loss, the experts' loads, and the gradient of every parameter."""

import jax
import numpy as np
import numpy_model
import pytest
from models import BATCH, CONFIGS, Z, leaves, parameters, result

MTP, BALANCE = 0.5, 0.7  # far larger than in training, as Z is, so that no term hides behind the main one
# A float32 pass through a few layers of width 16: sums of some hundred roundings of 6e-8, amplified by the norms.
RTOL = 2e-5

every_config = pytest.mark.parametrize("name", CONFIGS)


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)


def expected(name: str, tree):
    return numpy_model.terms(CONFIGS[name], tree, BATCH, mtp=MTP, balance_weight=BALANCE, z=Z)


@every_config
def test_terms_and_loads(name):
    _, terms = result(CONFIGS[name], mtp=MTP, balance=BALANCE)
    want = expected(name, wide(parameters(CONFIGS[name])))
    for key in ("main", "mtp", "balance", "z", "loss"):
        np.testing.assert_allclose(getattr(terms, key), want[key], rtol=RTOL, err_msg=key)
    assert terms.loads.keys() == want["loads"].keys()
    for key, load in want["loads"].items():
        np.testing.assert_array_equal(terms.loads[key], load, err_msg=key)


@every_config
def test_gradient_of_every_parameter(name):
    """Central differences of the float64 reference along one random direction per parameter.

    A tied embedding too, whose gradient is the sum of both uses.
    """
    grads, _ = result(CONFIGS[name], mtp=MTP, balance=BALANCE)
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
        trained = "['indexer']" not in path  # the loss reaches what chooses keys in no way
        assert np.any(grads[path] != 0) == trained, path
