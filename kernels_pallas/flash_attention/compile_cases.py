"""Attention at production shapes, for compilers."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.flash_attention import api
from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.flash_attention.shapes import SHAPES, Shape

EVERY_TIME: dict[api.Implementation, set[str]] = {  # of the kernels; the rest takes minutes
    "tpu": {"mla train 4K"},
    "gpu": {"mla train 32K, packed", "gqa train 128K", "absorbed mla prefill 4K"},
}
PACKED = {"mla train 32K"}  # also as rows of documents
SCALE = 0.1


def compile_cases() -> Iterator[CompileCase]:
    for name, shape in SHAPES.items():
        for packed in (False, True)[: 2 if name in PACKED else 1]:
            for implementation in EVERY_TIME:
                yield from _cases(f"{name}, packed" if packed else name, shape, packed, implementation)


def _cases(name: str, shape: Shape, packed: bool, implementation: api.Implementation) -> Iterator[CompileCase]:
    case = functools.partial(
        CompileCase,
        shape=name,
        implementation=implementation,
        every_time=name in EVERY_TIME[implementation],
        max_registers=168,  # three warpgroups on an SM of Hopper
    )
    q, k, v, out = (jax.ShapeDtypeStruct(a, jnp.bfloat16) for a in _operands(shape))
    lse = jax.ShapeDtypeStruct(out.shape[:3], jnp.float32)
    ids = [jax.ShapeDtypeStruct(a.shape[:2], jnp.int32) for a in (q, k)] if packed else []
    call = {"scale": SCALE, "softcap": None}
    forward = functools.partial(api.flash_attention, **call, implementation=implementation, return_lse=True)
    backward = functools.partial(_backward, implementation, **call)
    yield case(op="flash_attention", fn=_masked(forward, shape), args=(ids, q, k, v))
    yield case(op="flash_attention backward", fn=_masked(backward, shape), args=(ids, q, k, v, lse, out, lse))


def _operands(shape: Shape) -> tuple[tuple[int, ...], ...]:
    return shape.q_BTNK, shape.k_BSZK, shape.v_BSZU, (*shape.q_BTNK[:3], shape.v_width)


def _masked(fn: Callable, shape: Shape) -> Callable:
    def run(ids: list[jax.Array], *args: jax.Array):
        q_ids, kv_ids = ids or (None, None)
        return fn(*args, mask=dataclasses.replace(shape.mask, q_segment_ids_BT=q_ids, kv_segment_ids_BS=kv_ids))

    return run


def _backward(implementation, q_BTNK, k_BSZK, v_BSZU, lse_BTN, dout_BTNU, delta_BTN, mask: Mask, **call):
    back_end = api.BACK_ENDS[implementation]
    return back_end.backward(q_BTNK, k_BSZK, v_BSZU, mask, lse_BTN, dout_BTNU, delta_BTN, **call)
