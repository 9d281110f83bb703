"""Selected keys by dense attention under a mask, which CPUs take for short rows, against gathered ones; and which it is."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import FAST_COMPILE, QWEN, V32, gradient_of, result

from kernels_pallas import select
from mdl.attention import dsa, selection
from mdl.attention.core import Context
from mdl.attention.dsa import DsaConfig
from mdl.attention.gqa import GqaConfig
from mdl.linear import Init
from mdl.precision import PrecisionConfig
from mdl.rope import rotary_tables

ROUNDING = 1e-5  # two float32 orders of the same sums, through a few layers
SMALL = dataclasses.replace(V32, num_hidden_layers=2)
GROUPED = QWEN.attention
assert isinstance(GROUPED, GqaConfig)
# Keys and values of two heads; a query's own key is always among the selected.
GQA = dataclasses.replace(
    SMALL,
    attention=DsaConfig(dense=GROUPED, index_n_heads=2, index_head_dim=10, index_topk=4, index_window=1),
)


@pytest.fixture
def by_mask(monkeypatch):
    """Sets the rule to always or never."""

    def choose(always: bool) -> None:
        monkeypatch.setattr(selection, "MASKED_KEYS", 1000 if always else 0)
        gradient_of.cache_clear()

    yield choose
    gradient_of.cache_clear()


@pytest.mark.parametrize(
    ("config", "queries"),
    [
        pytest.param(SMALL, 4096, id="mla"),
        pytest.param(SMALL, 5, id="parts", marks=pytest.mark.slow),
        pytest.param(GQA, 4096, id="gqa", marks=pytest.mark.slow),
    ],
)
def test_the_same_losses_and_gradients(config, queries, by_mask, monkeypatch):
    """Of packed documents with padding, the indexer's loss included."""
    monkeypatch.setattr(dsa, "QUERIES", queries)
    by_mask(False)
    want_grads, want = result(config, indexer=2.0)
    by_mask(True)
    grads, got = result(config, indexer=2.0)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=ROUNDING)
    for path, grad in grads.items():
        np.testing.assert_allclose(
            grad, want_grads[path], rtol=0, atol=ROUNDING * np.abs(want_grads[path]).max(), err_msg=path
        )


def test_the_same_recall(by_mask):
    config = SMALL.attention
    positions_BT = jnp.arange(12, dtype=jnp.int32)[None]
    tables = rotary_tables(config.rope, config.rotary_dim, positions_BT)
    context = Context(positions_BT, jnp.ones((1, 12), jnp.int32), tables, measure="recall")
    assert isinstance(config, DsaConfig)
    module = config.build(16, eps=1e-6, init=Init(nnx.Rngs(0), 0.3, PrecisionConfig(compute="float32")))
    x_BTD = jax.random.normal(jax.random.key(0), (1, 12, 16))
    found = []
    for always in (False, True):
        by_mask(always)
        stats = jax.jit(lambda x: module(x, context).indexer, compiler_options=FAST_COMPILE)(x_BTD)
        assert stats is not None
        found.append(stats.recall)
    assert 4 < found[0] < 12
    np.testing.assert_allclose(*found, rtol=ROUNDING)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_the_choice_and_that_it_is_logged_once(platform, monkeypatch, caplog):
    monkeypatch.setattr(selection, "platform", lambda: platform)
    select.say.cache_clear()
    limit = selection.MASKED_KEYS * 512
    with caplog.at_level(logging.INFO, logger="kernels_pallas.select"):
        assert selection.selects_by_mask(limit, 512) == (platform == "cpu")
        assert not selection.selects_by_mask(limit + 1, 512)
        assert not selection.selects_by_mask(limit + 1, 512)
    how = "dense, under a mask" if platform == "cpu" else "gathered keys"
    assert caplog.messages == [
        f"attention to 512 of {limit} keys: implementation {how}",
        f"attention to 512 of {limit + 1} keys: implementation gathered keys",
    ]
