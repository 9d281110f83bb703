"""The Hopper kernel of FP8 products on a simulated chip. That it compiles is in test_aot.py."""

import operator

import jax.numpy as jnp
import pytest
from harness import Way
from test_fp8_gemm import ANY_SCALES, CASES, check, inputs, run

from kernels_pallas import Unsupported
from kernels_pallas.grouped_gemm import turns

HERE, THERE = (Way(implementation="gpu", where=where) for where in ("interpreted", "device"))
EVERY_TIME = {"several blocks, partial ones"}


@pytest.fixture
def interpretable(monkeypatch):
    """Several turns, and what the interpreter can run."""
    monkeypatch.setattr(turns, "BLOCKS", 2)
    monkeypatch.setattr(turns, "put", lambda ref, y: operator.setitem(ref, ..., y))


@pytest.mark.parametrize(
    "case",
    [c if str(c) in EVERY_TIME else pytest.param(c, marks=pytest.mark.slow) for c in (*CASES, ANY_SCALES)],
    ids=str,
)
def test_over_several_tiles(case, interpretable):
    check(case, HERE, jnp.bfloat16)


@pytest.mark.device
@pytest.mark.parametrize("case", [*CASES, ANY_SCALES], ids=str)
def test_on_a_chip(case):
    """Hopper adds up 128 terms with some 14 bits."""
    check(case, THERE, jnp.bfloat16, sums=2**-12)


def test_declines_other_dtypes():
    x, x_scale, w, w_scale, sizes = (jnp.asarray(a) for a in inputs(4, 128, 128, [4]))
    with pytest.raises(Unsupported, match="fp8_grouped_gemm on gpu gives bfloat16 or float16, not float32; 'xla' does"):
        run(x, x_scale, w, w_scale, sizes, jnp.float32, "gpu")
