"""A model whose ops run as Pallas kernels has the losses, gradients and texts of one in plain JAX."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from models import BATCH, V3, V32, gradient_of, parameters, pure, result

from kernels_pallas import select
from mdl.attention import selection
from mdl.kernels import KernelsConfig

ROUNDING = 2e-5  # float32 sums in two orders, through a few layers
KERNELS = KernelsConfig(**dict.fromkeys((field.name for field in dataclasses.fields(KernelsConfig)), "pallas"))
# One layer of experts: simulated, a kernel takes its time.
V3, V32 = (dataclasses.replace(config, num_hidden_layers=1, first_k_dense_replace=0, mtp=None) for config in (V3, V32))


@pytest.fixture
def on_tpu(monkeypatch):
    """Kernels for TPU, simulated; and which of them ran."""
    ran = []
    monkeypatch.setattr(selection, "MASKED_KEYS", 0)  # what a CPU would do
    monkeypatch.setattr(select, "chip", lambda: "tpu")
    monkeypatch.setattr(select, "say", lambda op, name: ran.append((op, name)))
    with pltpu.force_tpu_interpret_mode():
        yield ran
    gradient_of.cache_clear()


@pytest.mark.parametrize(
    ("config", "ops"),
    [
        pytest.param(V3, {"flash_attention", "expert_mlp"}, id="v3"),
        pytest.param(V32, {"select_keys", "sparse_attention", "expert_mlp"}, id="v32", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients(config, ops, on_tpu):
    want_grads, want = result(config, indexer=2.0)
    assert {said for said in on_tpu if said[1] == "tpu"} == set()
    grads, got = result(dataclasses.replace(config, kernels=KERNELS), indexer=2.0)
    assert {op for op, said in on_tpu if said == "tpu"} == ops
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=ROUNDING)
    for path, grad in grads.items():
        scale = np.abs(want_grads[path]).max()
        np.testing.assert_allclose(grad, want_grads[path], rtol=0, atol=ROUNDING * scale, err_msg=path)


def test_decoding(on_tpu):
    """Of absorbed attention: the last tokens of rows of a cache."""
    tree = parameters(V3)
    tokens = BATCH["tokens"][0, :2, :3]
    positions = np.broadcast_to(np.arange(3, dtype=np.int32), tokens.shape)

    def hidden(config):
        def run(params, buffers):
            model = pure(config).merge(params, buffers)
            return model(tokens, positions, cache=model.empty_cache(2, 16)).hidden_BTD

        return jax.jit(run)(tree["params"], tree["buffers"])

    want = hidden(V3)
    got = hidden(dataclasses.replace(V3, kernels=KERNELS))
    assert ("mla_decode", "tpu") in on_tpu
    np.testing.assert_allclose(got, want, atol=ROUNDING * np.abs(want).max())
