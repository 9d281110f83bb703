"""The TPU kernel of FP8 products on a simulated chip. That it compiles is in test_aot.py."""

import jax.numpy as jnp
import pytest
from harness import Way
from test_fp8_gemm import ANY_SCALES, CASES, check, inputs, run

from kernels_pallas import Unsupported
from kernels_pallas.fp8_gemm import tpu
from kernels_pallas.grouped_gemm.tpu import Tile

HERE, THERE = (Way(implementation="tpu", where=where) for where in ("interpreted", "device"))
EVERY_TIME = {"several blocks, partial ones"}


def some_slow(*cases):
    return [c if str(c) in EVERY_TIME else pytest.param(c, marks=pytest.mark.slow) for c in cases]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several of each dim."""
    monkeypatch.setattr(tpu, "choose", lambda *_: Tile(rows=128, inner=256, columns=128))


@pytest.mark.parametrize("case", some_slow(*CASES), ids=str)
def test_over_several_tiles(case, small_tiles):
    check(case, HERE, jnp.bfloat16)


@pytest.mark.parametrize("case", some_slow(*CASES), ids=str)
def test_in_one_tile(case):
    check(case, HERE, jnp.float32)


@pytest.mark.slow
def test_scales_of_any_kind():
    """Operands are rounded to the dtype of the result."""
    check(ANY_SCALES, HERE, jnp.bfloat16, rounding=2**-8)


@pytest.mark.device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_chip(case):
    check(case, THERE, jnp.bfloat16)


def test_declines_float16():
    x, x_scale, w, w_scale, sizes = (jnp.asarray(a) for a in inputs(4, 128, 128, [4]))
    with pytest.raises(Unsupported, match="fp8_grouped_gemm on TPU gives bfloat16 and float32, not float16"):
        run(x, x_scale, w, w_scale, sizes, jnp.float16, "tpu")
