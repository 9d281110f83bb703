"""Attention over selected keys against its equation in float64: values, logsumexp and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_attention_cases import NAMES, Case, check_bfloat16, check_float32, computed, tiles, truth

CASES = {
    "latents": Case(latents=True),
    "latents at once": Case(latents=True, tiled=False),
    "latents, the whole key a value": Case(latents=True, dims=(16, 16)),
    "one key head": Case(),
    "grouped": Case(heads=(4, 2), keys="causal"),
    "grouped at once": Case(heads=(6, 3), tiled=False),
    "every head its own": Case(heads=(3, 3), dims=(8, 12)),
    "causal latents": Case(latents=True, keys="causal", lengths=(21, 21)),
    "no keys at all": Case(latents=True, keys="none"),
    "no keys at all, own values": Case(keys="none"),
    "one key each": Case(keys="one", slots=1),
    "all keys": Case(keys="causal", slots=21, lengths=(21, 21), latents=True),
    "any order, some beyond either end": Case(keys="any order", heads=(4, 2)),
    "repeated": Case(keys="repeated", latents=True),
    "one query": Case(lengths=(1, 30), batch=3, latents=True),
    "four queries of many rows": Case(lengths=(4, 30), batch=5, latents=True),
    "one of everything": Case(lengths=(1, 1), batch=1, slots=1, heads=(1, 1), dims=(1, 1)),
}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation):
    check_float32(CASES[name], implementation)


@pytest.mark.parametrize("name", ["latents", "grouped", "every head its own"])
def test_rounding_in_bfloat16(name):
    check_bfloat16(CASES[name])


@pytest.mark.parametrize("name", ["latents", "grouped"])
def test_float64(name):
    case = CASES[name]
    with tiles(case), jax.enable_x64(True):
        for what, got, want in zip(NAMES, computed(case, jnp.float64), truth(case), strict=False):
            finite = np.isfinite(want)
            np.testing.assert_allclose(
                got[finite], want[finite], rtol=0, atol=1e-12 * np.abs(want[finite]).max(), err_msg=what
            )
