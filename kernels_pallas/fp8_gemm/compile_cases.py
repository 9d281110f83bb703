"""The FP8 products at production shapes, for compilers."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.fp8_gemm import api
from kernels_pallas.fp8_gemm.shapes import SHAPES

EVERY_TIME: dict[api.Implementation, set[str]] = {  # of the kernels; the rest takes minutes
    "tpu": {"edges", "edges, few rows"},
    "gpu": {"edges", "v3 down, 8 x 4096"},
}


def compile_cases() -> Iterator[CompileCase]:
    for name, shape in SHAPES.items():
        groups, inner, outer = shape.w_EDF
        blocks = -(-inner // 128), -(-outer // 128)
        args = (
            jax.ShapeDtypeStruct(shape.x_MD, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((shape.rows, blocks[0]), jnp.float32),
            jax.ShapeDtypeStruct((groups, outer, inner), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((groups, blocks[1], blocks[0]), jnp.float32),
            jax.ShapeDtypeStruct((groups,), jnp.int32),
        )
        for implementation, every_time in EVERY_TIME.items():
            yield CompileCase(
                op="fp8_grouped_gemm",
                shape=name,
                implementation=implementation,
                fn=functools.partial(api.BACK_ENDS[implementation].forward, dtype=jnp.dtype(jnp.bfloat16)),
                args=args,
                every_time=name in every_time,
                max_registers=168,  # three warpgroups on an SM of Hopper
            )
