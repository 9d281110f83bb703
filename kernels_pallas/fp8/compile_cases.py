"""The FP8 formats at production shapes, for compilers."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.fp8 import api
from kernels_pallas.fp8.shapes import ACTIVATIONS, WEIGHTS

EVERY_TIME = {"v3 hidden, decode", "v3 kv_a_proj", "edges"}  # the rest takes minutes


def compile_cases() -> Iterator[CompileCase]:
    kinds = [("activations", api.quantize_activations, ACTIVATIONS), ("weights", api.quantize_weights, WEIGHTS)]
    for kind, quantize, shapes in kinds:
        for name, shape in {**shapes, "edges": (300, 4000)}.items():
            x_MN = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            x = jax.eval_shape(lambda x, quantize=quantize: quantize(x, implementation="reference"), x_MN)
            for implementation in ("xla", "tpu", "gpu"):
                about = {
                    "shape": f"{name} {list(shape)}",
                    "implementation": implementation,
                    "every_time": name in EVERY_TIME and implementation in ("tpu", "gpu"),
                    "max_registers": 168,  # three blocks of threads on a Hopper SM
                }

                def run_quantize(x, quantize=quantize, implementation=implementation):
                    return quantize(x, ue8m0=True, implementation=implementation)

                def run_dequantize(x, implementation=implementation):
                    return api.dequantize(x, implementation=implementation)

                yield CompileCase(op=f"fp8.quantize_{kind}", fn=run_quantize, args=(x_MN,), **about)
                yield CompileCase(op=f"fp8.dequantize of {kind}", fn=run_dequantize, args=(x,), **about)
