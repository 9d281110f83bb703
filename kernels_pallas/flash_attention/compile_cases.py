"""Attention at production shapes, for compilers."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.flash_attention import api
from kernels_pallas.flash_attention.shapes import SHAPES, Shape

EVERY_TIME: dict[api.Implementation, set[str]] = {  # of the kernels; the rest takes minutes
    "tpu": {"mla train 4K"},
    "gpu": {"mla train 4K", "gqa train 128K", "mla prefill 4K of 32K"},
}
LACKING = {"gpu": {"absorbed mla prefill 4K"}}  # what an implementation declines
SCALE = 0.1


def compile_cases() -> Iterator[CompileCase]:
    for name, shape in SHAPES.items():
        for implementation, every_time in EVERY_TIME.items():
            if name in LACKING.get(implementation, ()):
                continue
            case = functools.partial(
                CompileCase,
                shape=name,
                implementation=implementation,
                every_time=name in every_time,
                max_registers=168,  # three warpgroups on an SM of Hopper
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
