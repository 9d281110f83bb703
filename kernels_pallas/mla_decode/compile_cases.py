"""Decoding attention at production shapes, for compilers."""

import functools
from collections.abc import Iterator
from typing import get_args

import jax
import jax.numpy as jnp

from kernels_pallas.aot import CompileCase
from kernels_pallas.mla_decode import api
from kernels_pallas.mla_decode.cache import Fp8LatentCache, LatentCache
from kernels_pallas.mla_decode.shapes import LATENT, PAGE, ROPE, SHAPES

FEW = {"v3, 4K"}  # what compilers say of the plain form is the same for all shapes, and takes seconds each


def compile_cases() -> Iterator[CompileCase]:
    def bf16(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    for name, shape in SHAPES.items():
        B, T, N, S = shape.batch, shape.queries, shape.heads, shape.capacity or shape.length
        fp8_bytes = LATENT + 4 * (LATENT // 128) + 2 * ROPE
        pages, table = B * S // PAGE, jax.ShapeDtypeStruct((B, S // PAGE), jnp.int32)
        caches = {
            "contiguous": LatentCache(bf16(B, S, LATENT), bf16(B, S, ROPE)),  # pyright: ignore[reportArgumentType]
            "paged": LatentCache(bf16(pages, PAGE, LATENT), bf16(pages, PAGE, ROPE), table),  # pyright: ignore[reportArgumentType]
            "paged fp8": Fp8LatentCache(jax.ShapeDtypeStruct((pages, PAGE, fp8_bytes), jnp.uint8), LATENT, table),  # pyright: ignore[reportArgumentType]
        }
        lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
        for storage, cache in caches.items():
            for implementation in get_args(api.Implementation):
                # The reference is a specification, and holds the whole cache in float32.
                if implementation == "reference" or (implementation == "xla" and name not in FEW):
                    continue
                yield CompileCase(
                    op="mla_decode",
                    shape=f"{name}, {storage}",
                    implementation=implementation,
                    fn=functools.partial(api.mla_decode, scale=192**-0.5, implementation=implementation),
                    args=(bf16(B, T, N, LATENT), bf16(B, T, N, ROPE), cache, lengths),
                    every_time=name in FEW and implementation != "xla",
                    max_registers=168,  # three warpgroups on an SM of Hopper
                )
