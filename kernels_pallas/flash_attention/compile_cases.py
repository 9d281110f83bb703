"""Attention at production shapes, for compilers."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.flash_attention import api
from kernels_pallas.flash_attention.shapes import SHAPES, Shape

EVERY_TIME = {"mla train 4K"}  # of the kernels; the rest takes minutes
IMPLEMENTATIONS: tuple[api.Implementation, ...] = ("tpu",)
SCALE = 0.1


def compile_cases() -> Iterator[CompileCase]:
    for name, shape in SHAPES.items():
        for implementation in IMPLEMENTATIONS:
            case = functools.partial(
                CompileCase,
                shape=name,
                implementation=implementation,
                every_time=name in EVERY_TIME,
            )
            q, k, v, out = (jax.ShapeDtypeStruct(a, jnp.bfloat16) for a in _operands(shape))
            lse = jax.ShapeDtypeStruct(out.shape[:3], jnp.float32)
            call = {"scale": SCALE, "softcap": None}
            forward = functools.partial(
                api.flash_attention, scale=SCALE, mask=shape.mask, implementation=implementation, return_lse=True
            )
            yield case(op="flash_attention", fn=forward, args=(q, k, v))
            backward = functools.partial(_backward, implementation, shape, **call)
            yield case(op="flash_attention backward", fn=backward, args=(q, k, v, lse, out, lse))


def _operands(shape: Shape) -> tuple[tuple[int, ...], ...]:
    return shape.q_BTNK, shape.k_BSZK, shape.v_BSZU, (*shape.q_BTNK[:3], shape.v_width)


def _backward(implementation, shape, q_BTNK, k_BSZK, v_BSZU, lse_BTN, dout_BTNU, delta_BTN, **call):
    back_end = api.BACK_ENDS[implementation]
    return back_end.backward(q_BTNK, k_BSZK, v_BSZU, shape.mask, lse_BTN, dout_BTNU, delta_BTN, **call)
