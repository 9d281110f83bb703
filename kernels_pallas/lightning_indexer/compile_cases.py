"""The lightning indexer at production shapes, for compilers."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.lightning_indexer import api
from kernels_pallas.lightning_indexer.shapes import SHAPES, Shape

EVERY_TIME = {("select_keys", "tiny_dsa", "tpu"), ("select_keys fp8", "v3.2 4K", "gpu")}  # the rest takes minutes
# Selecting among so many, libtpu 0.0.42 aborts for tpu7x, with a kernel or without: lowering gathers to SparseCores, it loses a
# buffer.
CRASHES = {"v3.2 4K of 128K": ("tpu7x",)}
SCALE = 192**-0.5
FP8 = jnp.float8_e4m3fn


def compile_cases() -> Iterator[CompileCase]:
    for name, shape in SHAPES.items():
        case = functools.partial(_case, name)
        for implementation in ("xla", "tpu", "gpu"):
            select = functools.partial(_select, shape, implementation)
            yield case("select_keys", implementation, select, _indexer(shape, jnp.bfloat16))
            if implementation != "xla":
                scale = jax.ShapeDtypeStruct((1, shape.keys), jnp.float32)
                yield case("select_keys fp8", implementation, select, (*_indexer(shape, FP8), scale))
        # The losses are plain JAX on all platforms.
        index = jax.ShapeDtypeStruct((1, shape.queries, shape.topk), jnp.int32)
        args = (*_indexer(shape, jnp.bfloat16), *_attention(shape))
        yield case("dense_kl and gradients", "xla", functools.partial(_dense_kl, shape), args)
        yield case("selected_kl and gradients", "xla", _selected_kl, (*args, index))


def _case(shape: str, op: str, implementation: str, fn: Callable, args: tuple[Any, ...]) -> CompileCase:
    return CompileCase(
        op=op,
        shape=shape,
        implementation=implementation,
        fn=fn,
        args=args,
        every_time=(op, shape, implementation) in EVERY_TIME,
        max_registers=168,  # three warpgroups on an SM of Hopper
        crashes=CRASHES.get(shape, ()) if op.startswith("select_keys") else (),
    )


def _indexer(shape: Shape, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((1, shape.queries, shape.index_heads, shape.index_width), dtype),
        jax.ShapeDtypeStruct((1, shape.queries, shape.index_heads), jnp.float32),
        jax.ShapeDtypeStruct((1, shape.keys, shape.index_width), dtype),
    )


def _attention(shape: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((1, shape.queries, shape.heads, shape.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, shape.keys, 1, shape.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, shape.queries, shape.heads), jnp.float32),
    )


def _select(shape: Shape, implementation: api.Implementation, q_BTIJ, w_BTI, k_BSJ, k_scale_BS=None) -> jax.Array:
    return api.select_keys(
        q_BTIJ,
        w_BTI,
        k_BSJ,
        k_scale_BS=k_scale_BS,
        mask=shape.mask,
        topk=shape.topk,
        implementation=implementation,
    )


def _dense_kl(shape: Shape, *args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def loss(q_BTIJ, w_BTI, k_BSJ, *attention):
        found = api.dense_kl(q_BTIJ, w_BTI, k_BSJ, *attention, scale=SCALE, mask=shape.mask, implementation="xla")
        return jnp.sum(found.kl_BT)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(*args)


def _selected_kl(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def loss(q_BTIJ, w_BTI, k_BSJ, *others):
        found = api.selected_kl(q_BTIJ, w_BTI, k_BSJ, *others, scale=SCALE, implementation="xla")
        return jnp.sum(found.kl_BT)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(*args)
