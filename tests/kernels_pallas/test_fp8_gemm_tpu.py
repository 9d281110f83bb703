"""The TPU kernel of FP8 products on a simulated chip. That it compiles is in test_aot.py."""

import functools

import jax
import jax.numpy as jnp
import pytest
from harness import Way
from jax.extend.core import jaxprs_in_params
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


@pytest.fixture(params=["dequantized", "promoted"])
def form(request, monkeypatch):
    monkeypatch.setattr(tpu, "PROMOTED", {"dequantized": 0, "promoted": 512}[request.param])
    return request.param


@pytest.mark.parametrize("case", some_slow(*CASES), ids=str)
def test_over_several_tiles(case, form, small_tiles):
    check(case, HERE, jnp.bfloat16)


@pytest.mark.parametrize("case", some_slow(*CASES), ids=str)
def test_in_one_tile(case, form):
    check(case, HERE, jnp.float32)


@pytest.mark.parametrize("form", ["promoted", pytest.param("dequantized", marks=pytest.mark.slow)], indirect=True)
def test_scales_of_any_kind(form, small_tiles):
    """Operands are rounded to the dtype of the result only where they are dequantized."""
    check(ANY_SCALES, HERE, jnp.bfloat16, rounding=2**-8 if form == "dequantized" else 0)


def test_sums_are_promoted_for_few_rows():
    """By what is multiplied, in the kernel that a call chooses for itself."""
    for rows, multiplied in ((256, {"float8_e4m3fn"}), (257, {"bfloat16"})):
        x, x_scale, w, w_scale, sizes = (jnp.asarray(a) for a in inputs(rows, 128, 128, [rows]))
        traced = jax.make_jaxpr(functools.partial(run, dtype=jnp.bfloat16, implementation="tpu"))
        assert set(operands_of_products(traced(x, x_scale, w, w_scale, sizes))) == multiplied


def operands_of_products(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield from (str(operand.aval.dtype) for operand in eqn.invars)
        for inner in jaxprs_in_params(eqn.params):
            yield from operands_of_products(inner)


@pytest.mark.device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_chip(case, form):
    check(case, THERE, jnp.bfloat16)


def test_declines_float16():
    x, x_scale, w, w_scale, sizes = (jnp.asarray(a) for a in inputs(4, 128, 128, [4]))
    with pytest.raises(Unsupported, match="fp8_grouped_gemm on TPU gives bfloat16 and float32, not float16"):
        run(x, x_scale, w, w_scale, sizes, jnp.float16, "tpu")
