"""The grouped products at production shapes, for compilers."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.grouped_gemm import api
from kernels_pallas.grouped_gemm.shapes import SHAPES

EVERY_TIME: dict[api.Implementation, str] = {  # of the kernels; the rest takes minutes
    "tpu": "small, 16 x 512",
    "gpu": "moe_1b gate, 64 x 1536",
}


def compile_cases() -> Iterator[CompileCase]:
    for name, shape in SHAPES.items():
        x, w, y = (jax.ShapeDtypeStruct(a, jnp.bfloat16) for a in (shape.x_MD, shape.w_EDF, shape.y_MF))
        sizes = jax.ShapeDtypeStruct((shape.groups,), jnp.int32)
        for implementation, every_time in EVERY_TIME.items():
            back_end = api.BACK_ENDS[implementation]
            for op, product, args in (
                ("grouped_gemm", back_end.forward, (x, w, sizes)),
                ("grouped_gemm backward, rows", back_end.backward_rows, (y, w, sizes)),
                ("grouped_gemm backward, weights", functools.partial(_weights, back_end), (x, y, sizes)),
            ):
                yield CompileCase(
                    op=op,
                    shape=name,
                    implementation=implementation,
                    fn=product,
                    args=args,
                    every_time=name == every_time,
                    max_registers=168,  # three warpgroups on an SM of Hopper
                    too_small=("v5e",) if _bytes(x, w, y) > 16e9 else (),
                )


def _weights(back_end, x_MD, dy_MF, sizes_E):
    return back_end.backward_weights(x_MD, dy_MF, sizes_E, jnp.bfloat16)


def _bytes(*arrays: jax.ShapeDtypeStruct) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)
