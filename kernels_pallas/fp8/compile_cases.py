"""The FP8 formats at production shapes, for compilers."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.fp8 import api
from kernels_pallas.fp8.shapes import ACTIVATIONS, WEIGHTS

EVERY_TIME = {"v3 hidden, decode", "v3 kv_a_proj", "edges"}  # of the kernels; the rest takes minutes
EDGES = (300, 4000)  # no multiple of a tile
IMPLEMENTATIONS: tuple[api.Implementation, ...] = ("xla", "tpu", "gpu")


def compile_cases() -> Iterator[CompileCase]:
    kinds = [("activations", api.quantize_activations, ACTIVATIONS), ("weights", api.quantize_weights, WEIGHTS)]
    for kind, quantize, shapes in kinds:
        for name, shape in {**shapes, "edges": EDGES}.items():
            x_MN = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            x = jax.eval_shape(quantize, x_MN)
            for implementation in IMPLEMENTATIONS:
                case = functools.partial(
                    CompileCase,
                    shape=f"{name} {list(shape)}",
                    implementation=implementation,
                    every_time=name in EVERY_TIME and implementation != "xla",
                    max_registers=168,  # three warpgroups on an SM of Hopper
                )
                fn = functools.partial(quantize, ue8m0=True, implementation=implementation)
                yield case(op=f"fp8.quantize_{kind}", fn=fn, args=(x_MN,))
                fn = functools.partial(api.dequantize, implementation=implementation)
                yield case(op=f"fp8.dequantize of {kind}", fn=fn, args=(x,))
