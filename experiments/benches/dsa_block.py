"""The programs that `bench dsa` measures: an attention with its projections, trained on one row, and decoding one token."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from experiments.compilation.memory import Memory
from kernels_pallas import aot
from mdl import sharding
from mdl.attention.core import Context
from mdl.attention.dsa import Dsa, DsaConfig
from mdl.attention.gqa import GqaConfig
from mdl.attention.mla import MlaConfig
from mdl.linear import Init
from mdl.precision import PrecisionConfig
from mdl.rope import rotary_tables
from mdl.sharding import MeshConfig, spec

STD, EPS = 0.02, 1e-6  # of parameters, and of norms; rows are standard normal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    hidden_size: int
    attention: DsaConfig | MlaConfig | GqaConfig
    precision: PrecisionConfig

    @property
    def dense(self) -> "Block":
        """The block without a choice of keys."""
        attention = self.attention
        return dataclasses.replace(self, attention=attention.dense if isinstance(attention, DsaConfig) else attention)

    def build(self) -> Any:
        init = Init(nnx.Rngs(0), std=STD, precision=self.precision)
        return self.attention.build(self.hidden_size, eps=EPS, init=init)

    def row(self, seed: int, tokens: int) -> jax.Array:
        """x_BTD of one row."""
        shape, partition = (1, tokens, self.hidden_size), sharding.optional_sharding(spec("batch", None, None))
        return jax.random.normal(jax.random.key(seed), shape, self.precision.compute_dtype, out_sharding=partition)

    def context(self, positions_T: jax.Array, *, cached: bool) -> Context:
        positions_BT = sharding.reshard(positions_T[None], spec("batch", None))
        rotary = rotary_tables(self.attention.rope, self.attention.rotary_dim, positions_BT)
        if cached:
            return Context(positions_BT, None, rotary)
        return Context(positions_BT, jnp.ones_like(positions_BT), rotary, measure="loss")


def training(block: Block, tokens: int) -> tuple[Callable, Callable]:
    """init() -> (params, x_BTD, do_BTD), and forward_and_backward of these -> (o_BTD, loss, gradients of params and x_BTD).

    The loss is the mean over tokens of the indexer's, 0 without one.
    """
    graph = nnx.split(nnx.eval_shape(block.build))[0]

    def init() -> tuple[Any, ...]:
        return nnx.split(block.build())[1], block.row(1, tokens), block.row(2, tokens)

    def forward(params: Any, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        module = nnx.merge(graph, params, copy=True)
        found = module(x_BTD, block.context(jnp.arange(tokens, dtype=jnp.int32), cached=False))
        if not isinstance(module, Dsa):
            return found[0], jnp.float32(0)
        return found.o_BTD, found.indexer.kl / tokens

    def forward_and_backward(params: Any, x_BTD: jax.Array, do_BTD: jax.Array) -> Any:
        (o_BTD, loss), transpose = jax.vjp(forward, params, x_BTD)
        return o_BTD, loss, transpose((do_BTD, jnp.ones_like(loss)))

    return init, forward_and_backward


def decoding(block: Block, slots: int) -> tuple[Callable, Callable]:
    """init() -> (params, x_BTD, cache), and step of these -> (o_BTD, cache), one token in the last of so many slots."""
    graph = nnx.split(nnx.eval_shape(block.build))[0]

    def init() -> tuple[Any, ...]:
        module = block.build()
        empty = module.empty_cache(1, slots, block.precision.compute_dtype)
        cache = {name: jax.random.normal(jax.random.key(2), a.shape).astype(a.dtype) for name, a in empty.items()}
        return nnx.split(module)[1], block.row(1, 1), cache

    def step(params: Any, x_BTD: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        context = block.context(jnp.array([slots - 1], jnp.int32), cached=True)
        return tuple(nnx.merge(graph, params, copy=True)(x_BTD, context, cache)[:2])

    return init, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    run: Callable[[], Any]
    memory: Memory


def trained(block: Block, tokens: int) -> Program:
    """Compiled for the mesh in use."""
    init, forward_and_backward = training(block, tokens)
    arguments = jax.jit(init)()
    compiled = jax.jit(forward_and_backward).lower(*arguments).compile()
    return Program(run=functools.partial(compiled, *arguments), memory=Memory.of(compiled))


def decoded(block: Block, slots: int) -> Program:
    """Compiled for the mesh in use; the cache stays where it is."""
    init, step = decoding(block, slots)
    params, x_BTD, cache = jax.jit(init)()
    compiled = jax.jit(step, donate_argnums=2).lower(params, x_BTD, cache).compile()

    def run() -> jax.Array:
        nonlocal cache
        o_BTD, cache = compiled(params, x_BTD, cache)
        return o_BTD

    return Program(run=run, memory=Memory.of(compiled))


def compile_for(block: Block, tokens: int, chip: aot.Chip) -> tuple[Memory, float]:
    """What training on a row of so many tokens takes on one chip, and the seconds of compiling; nothing is made.

    The gradient of the output is donated, as it is nobody's after this block.
    """
    began = time.perf_counter()
    init, forward_and_backward = training(block, tokens)
    with aot.compilers():
        mesh = MeshConfig().build([chip.device])
        with jax.set_mesh(mesh):
            arguments = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, a.sharding.spec)),
                jax.eval_shape(init),
            )
            traced = jax.jit(forward_and_backward, donate_argnums=2).trace(*arguments)
            compiled = traced.lower(lowering_platforms=(chip.platform,)).compile()
    return Memory.of(compiled), time.perf_counter() - began
