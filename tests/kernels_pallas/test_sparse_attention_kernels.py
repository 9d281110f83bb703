"""Attention to selected latents by the kernels of decoding, on simulated chips. That they compile is in test_aot.py."""

import jax
import jax.numpy as jnp
import pytest
from harness import interpreted
from sparse_attention_cases import Case, check_bfloat16, check_float32

from kernels_pallas import Unsupported, sparse_attention
from kernels_pallas.mla_decode import gpu


@pytest.mark.parametrize("keys", ["some", "any order"])
def test_on_tpu(keys):
    """Chunks of four queries; some without keys, others whose indices are in no order."""
    with interpreted("tpu"):
        check_float32(Case(latents=True, keys=keys, lengths=(5, 30), dims=(40, 32)), "tpu")


def test_on_hopper(monkeypatch):
    def choose(latent, rope):
        return gpu.Tile(latent=latent, rope=rope, stages=2, in_shared_memory=True)

    monkeypatch.setattr(gpu, "choose", choose)
    with interpreted("gpu"):
        case = Case(latents=True, lengths=(3, 70), slots=64, dims=(192, 128), batch=1, tiled=False)
        check_bfloat16(case, "gpu")


@pytest.mark.device
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_on_a_chip(implementation):
    """Values and gradients at the widths of DeepSeek-V3.2; some queries have few keys or none."""
    if jax.default_backend() != implementation:
        pytest.skip(f"no device for {implementation!r}: this is {jax.default_backend()}")
    case = Case(latents=True, heads=(16, 1), lengths=(21, 300), slots=128, dims=(576, 512), tiled=False)
    check_bfloat16(case, implementation)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_what_is_not_latents_is_declined(implementation):
    q, index = jnp.ones((1, 4, 2, 8)), jnp.zeros((1, 4, 3), jnp.int32)
    for values in ({"v_BSZU": q}, {"v_BSZU": None, "value_width": 4}, {"v_BSZU": None, "value_width": 8}):
        k = q[:, :, :1] if values.get("value_width") == 8 else q
        with pytest.raises(Unsupported, match="one key head"):
            sparse_attention(q, k, index_BTW=index, scale=1.0, implementation=implementation, **values)
