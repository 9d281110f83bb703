"""Decoding attention at production shapes, for compilers."""

import functools
from collections.abc import Iterator
from typing import get_args

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.mla_decode import api
from kernels_pallas.mla_decode.cache import AnyCache, Fp8LatentCache, LatentCache
from kernels_pallas.mla_decode.shapes import LATENT, ROPE, SHAPES, Shape, page

FEW = {"v3, 4K"}  # what compilers say of the plain form is the same for all shapes, and takes seconds each
EVERY_TIME = {"tpu": {"paged"}, "gpu": {"contiguous", "paged", "paged fp8"}}  # of FEW; four chips take longer than one


def compile_cases() -> Iterator[CompileCase]:
    for name, shape in SHAPES.items():
        B, T, N = shape.batch, shape.queries, shape.heads
        for implementation in get_args(api.Implementation):
            # The reference is a specification, and holds the whole cache in float32.
            if implementation == "reference" or (implementation == "xla" and name not in FEW):
                continue
            for storage, cache in _caches(shape, page(implementation)).items():
                yield CompileCase(
                    op="mla_decode",
                    shape=f"{name}, {storage}",
                    implementation=implementation,
                    fn=functools.partial(api.mla_decode, scale=192**-0.5, implementation=implementation),
                    args=(_bf16(B, T, N, LATENT), _bf16(B, T, N, ROPE), cache, jax.ShapeDtypeStruct((B,), jnp.int32)),
                    every_time=name in FEW and storage in EVERY_TIME.get(implementation, ()),
                    max_registers=168,  # three warpgroups on an SM of Hopper
                )


def _caches(shape: Shape, Y: int) -> dict[str, AnyCache]:
    B, S = shape.batch, shape.capacity or shape.length
    pages, table = B * S // Y, jax.ShapeDtypeStruct((B, S // Y), jnp.int32)
    fp8_bytes = LATENT + 4 * (LATENT // 128) + 2 * ROPE
    return {
        "contiguous": LatentCache(_bf16(B, S, LATENT), _bf16(B, S, ROPE)),  # pyright: ignore[reportArgumentType]
        "paged": LatentCache(_bf16(pages, Y, LATENT), _bf16(pages, Y, ROPE), table),  # pyright: ignore[reportArgumentType]
        "paged fp8": Fp8LatentCache(jax.ShapeDtypeStruct((pages, Y, fp8_bytes), jnp.uint8), LATENT, table),  # pyright: ignore[reportArgumentType]
    }


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
