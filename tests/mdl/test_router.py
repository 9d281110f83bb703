"""The router against float64 NumPy, one token at a time: choices, weights, loads, balance loss, bias update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from flax import nnx

from mdl.linear import Init
from mdl.moe.router import Router, RouterConfig, updated_bias
from mdl.precision import PrecisionConfig

E, B, T = 8, 3, 10
BASE = RouterConfig(n_routed_experts=E, num_experts_per_tok=3)
GROUPS = {"n_group": 4, "topk_group": 2}
CASES = {
    "v3": dataclasses.replace(BASE, **GROUPS),
    "v3_no_groups": BASE,
    "v3_one_group_kept": dataclasses.replace(BASE, n_group=2, topk_group=1),
    "v3_softmax": dataclasses.replace(BASE, scoring_func="softmax", **GROUPS),
    "v2": dataclasses.replace(
        BASE,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        **GROUPS,
    ),
    "v2_lite": dataclasses.replace(
        BASE, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0
    ),
    "qwen3": dataclasses.replace(BASE, scoring_func="softmax", topk_method="greedy", routed_scaling_factor=1.0),
    "all_experts": dataclasses.replace(BASE, num_experts_per_tok=E),
    "one_expert": dataclasses.replace(BASE, num_experts_per_tok=1),
}
# Biases that make nearly every biased score negative: a dropped group filled with 0 instead of -inf would win.
BIASES = {"none": np.zeros(E), "mixed": np.linspace(-0.5, 0.5, E), "negative": -1.5 + 0.1 * np.cos(np.arange(E))}


def routing(config: RouterConfig, logits_BTE: np.ndarray, bias_E: np.ndarray, valid_BT: np.ndarray | None):
    """Of a router whose matrix is the identity, so that its input is the logits."""
    router = Router(config, E, init=Init(nnx.Rngs(0), 0.1, PrecisionConfig(compute="float32")))
    router.weight[...] = jnp.eye(E)
    if router.bias is not None:
        router.bias[...] = jnp.asarray(bias_E, jnp.float32)
    return nnx.jit(lambda router, x, valid: router(x, valid))(router, jnp.asarray(logits_BTE, jnp.float32), valid_BT)


def case(name: str, bias: str):
    config = CASES[name]
    rng = np.random.default_rng(len(name))
    logits = rng.standard_normal((B, T, E)).astype(np.float32)
    valid = np.arange(T) < np.array([[T], [4], [0]])
    return config, logits, BIASES[bias] if config.has_bias else np.zeros(E), valid


@pytest.mark.parametrize(
    ("name", "bias"), [(name, bias) for name in CASES for bias in (BIASES if CASES[name].has_bias else ["none"])]
)
def test_router(name, bias):
    config, logits, bias_E, valid = case(name, bias)
    got = routing(config, logits, bias_E, jnp.asarray(valid))
    load, balances = np.zeros(E), 0.0
    for b in range(B):
        scores = np.stack([numpy_model.affinities(row, config) for row in logits[b].astype(np.float64)])
        for t in range(T):
            chosen = numpy_model.choose(scores[t], bias_E.astype(np.float32), config)
            assert sorted(chosen) == sorted(got.index_BTX[b, t].tolist())
            want = dict(zip(chosen, numpy_model.gates(scores[t], chosen, config), strict=True))
            want = [want[e] for e in got.index_BTX[b, t].tolist()]
            np.testing.assert_allclose(
                got.weight_BTX[b, t], want, rtol=1e-5
            )  # a sigmoid, a sum and a quotient in float32
            load[chosen] += valid[b, t]
        if valid[b].any():
            balances += numpy_model.balance(scores[valid[b]], config)
    np.testing.assert_array_equal(got.load_E, load)
    assert load.sum() == valid.sum() * config.num_experts_per_tok
    np.testing.assert_allclose(got.balance_loss, balances, rtol=1e-5)


def test_negative_scores_tell_dropped_groups_from_zero():
    """The case above would not notice a fill of 0 unless kept scores are negative: they are."""
    _, logits, bias_E, _ = case("v3", "negative")
    assert np.all(numpy_model.sigmoid(logits) + bias_E < 0)


def test_bias_changes_choices_but_not_weights():
    config = dataclasses.replace(
        CASES["v3_no_groups"], num_experts_per_tok=E
    )  # everything is chosen: only weights are left
    _, logits, _, _ = case("v3_no_groups", "none")
    weights = []
    for bias in BIASES.values():
        got = routing(config, logits, bias, None)
        order = np.argsort(got.index_BTX, axis=-1)
        weights.append(np.take_along_axis(np.asarray(got.weight_BTX), order, axis=-1))
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-6)
    np.testing.assert_allclose(weights[0], weights[2], rtol=1e-6)


def test_balance_loss_of_equal_and_of_collapsed_loads():
    """1 when experts are chosen equally or affinities are equal; E / K_r when the same K_r experts take everything."""
    config = dataclasses.replace(BASE, num_experts_per_tok=2, scoring_func="softmax", topk_method="greedy")
    tokens = np.full((1, E, E), -20.0)
    for t in range(E):
        tokens[0, t, [t, (t + 1) % E]] = 0
    np.testing.assert_allclose(routing(config, tokens, np.zeros(E), None).balance_loss, 1, rtol=1e-6)
    tokens = np.broadcast_to(np.where(np.arange(E) < 2, 0.0, -20.0), (1, E, E))
    np.testing.assert_allclose(routing(config, tokens, np.zeros(E), None).balance_loss, E / 2, rtol=1e-6)


def test_update_of_the_bias():
    load = np.array([[5.0, 1, 3, 3], [0, 0, 0, 12]], np.float32)
    got = updated_bias(jnp.full((2, 4), 0.25), jnp.asarray(load), 0.001)
    want = 0.25 + 0.001 * np.array([[-1, 1, 0, 0], [1, 1, 1, -1]])
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_forced_balance(name):
    """Said aloud; equal loads over E tokens, distinct experts, no more groups than allowed; weights are still the affinities'."""
    with pytest.warns(UserWarning, match="for benchmarks only"):
        config = dataclasses.replace(CASES[name], forced_balance=True)
    logits = np.random.default_rng(0).standard_normal((2, 2 * E, E)).astype(np.float32)
    got = routing(config, logits, np.zeros(E), None)
    X = config.num_experts_per_tok
    np.testing.assert_array_equal(got.load_E, 4 * X)
    chosen = np.sort(got.index_BTX, axis=-1)
    assert np.all(np.diff(chosen, axis=-1) > 0) and chosen.min() >= 0 and chosen.max() < E
    if config.limits_groups:
        groups = chosen.reshape(-1, X) * config.n_group // E
        assert max(len(set(row)) for row in groups.tolist()) <= config.topk_group
    scores = numpy_model.affinities(logits[1, 3].astype(np.float64), config)
    index = got.index_BTX[1, 3].tolist()
    np.testing.assert_allclose(got.weight_BTX[1, 3], numpy_model.gates(scores, index, config), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
        ({"n_group": 3}, "n_group=3"),
        ({"n_group": 0}, "n_group=0"),
        ({"n_group": 2, "topk_group": 3}, "topk_group=3"),
        ({"n_group": 8, "topk_group": 4}, "two best"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0"),
        ({"n_group": 4, "topk_group": 1}, "fewer than num_experts_per_tok=3"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_no_gradient_reaches_the_choice():
    """Weights move with the affinities of the chosen experts, and with nothing else."""
    config = dataclasses.replace(CASES["v3_no_groups"], norm_topk_prob=False)
    _, logits, bias, _ = case("v3_no_groups", "mixed")
    router = Router(config, E, init=Init(nnx.Rngs(0), 0.1, PrecisionConfig(compute="float32")))
    router.weight[...] = jnp.eye(E)
    router.bias[...] = jnp.asarray(bias, jnp.float32)
    index = router(jnp.asarray(logits)).index_BTX
    gradient = jax.grad(lambda x: jnp.sum(router(x).weight_BTX))(jnp.asarray(logits))
    chosen = np.any(np.asarray(index)[..., None] == np.arange(E), axis=2)
    s = numpy_model.sigmoid(logits.astype(np.float64))
    np.testing.assert_allclose(gradient, np.where(chosen, config.routed_scaling_factor * s * (1 - s), 0), rtol=1e-5)
