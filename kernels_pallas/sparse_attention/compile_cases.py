"""Attention to selected keys at production shapes, for compilers."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.sparse_attention import api
from kernels_pallas.sparse_attention.shapes import LATENT, SHAPES

EVERY_TIME = {"16 heads train 4K of 32K"}  # of the kernels; TPU's compiler thinks long about the backward pass
SCALE = 192**-0.5


def compile_cases() -> Iterator[CompileCase]:
    for name, shape in SHAPES.items():
        q, k, out = (jax.ShapeDtypeStruct(a, jnp.bfloat16) for a in (shape.q_BTNK, shape.k_BSZK, shape.out_BTNU))
        index = jax.ShapeDtypeStruct(shape.index_BTW, jnp.int32)
        lse = jax.ShapeDtypeStruct(out.shape[:3], jnp.float32)
        for implementation in ("xla", "tpu", "gpu"):
            yield CompileCase(
                op="sparse_attention",
                shape=name,
                implementation=implementation,
                fn=functools.partial(_forward, implementation),
                args=(q, k, index),
                every_time=implementation != "xla" and name in EVERY_TIME,
                max_registers=168,  # three warpgroups on an SM of Hopper
            )
        yield CompileCase(
            op="sparse_attention backward",
            shape=name,
            implementation="xla",
            fn=_backward,
            args=(q, k, index, lse, out, lse),
            every_time=False,
        )


def _forward(implementation: api.Implementation, q_BTNK, k_BSZK, index_BTW) -> tuple[jax.Array, jax.Array]:
    return api.sparse_attention(
        q_BTNK,
        k_BSZK,
        None,
        index_BTW,
        scale=SCALE,
        value_width=LATENT,
        implementation=implementation,
        return_lse=True,
    )


def _backward(q_BTNK, k_BSZK, index_BTW, lse_BTN, dout_BTNU, delta_BTN):
    back_end = api.BACK_ENDS["xla"]
    return back_end.backward(q_BTNK, k_BSZK, None, index_BTW, lse_BTN, dout_BTNU, delta_BTN, scale=SCALE)
