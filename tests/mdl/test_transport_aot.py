"""Transports compiled for what is not there: eight TPUs, eight H200s."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from experiments.compilation.hlo import Program
from experiments.step import COMPILER_OPTIONS
from kernels_pallas import aot, expert_mlp
from kernels_pallas.aot_cluster import cluster
from mdl.linear import Init
from mdl.moe.dispatch import dispatch
from mdl.moe.experts import Experts
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.moe.transport_all_to_all import AllToAllConfig
from mdl.moe.transport_ragged import RaggedAllToAllConfig
from mdl.precision import PrecisionConfig
from mdl.sharding import MeshConfig, spec

AXES = {
    "gate_EDF": ("experts", "embed", "mlp"),
    "up_EDF": ("experts", "embed", "mlp"),
    "down_EFD": ("experts", "mlp", "embed"),
}
needs_compilers = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))


def compiled_gradient(name, transport, *, tokens=32, width=128, options=None) -> str:
    """The optimized HLO of the gradient of a layer on 2 x 4 devices, over all that has one."""
    B, T, D, F, E, X = 8, tokens, width, width, 8, 2
    target = cluster(name)
    experts = nnx.eval_shape(lambda: Experts(E, D, F, init=Init(nnx.Rngs(0), 1.0, PrecisionConfig())))
    graph, state = nnx.split(experts)
    mesh = MeshConfig(data=2, expert=4).build(target.devices)

    def argument(shape, axes, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*axes)))

    def loss(x, weight, matrices, index):
        nnx.replace_by_pure_dict(state, matrices)
        y, traffic = dispatch(x, index, weight, nnx.merge(graph, state), transport)
        return jnp.sum(y.astype(jnp.float32) ** 2), traffic

    rows, shapes = ("batch", None, None), nnx.to_pure_dict(state)
    matrices = {name: argument(shapes[name].shape, axes, jnp.float32) for name, axes in AXES.items()}
    x, index = argument((B, T, D), rows, jnp.bfloat16), argument((B, T, X), rows, jnp.int32)
    with target.compiling(), jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        traced = gradient.trace(x, argument((B, T, X), rows, jnp.float32), matrices, index)
        return traced.lower(lowering_platforms=(target.chip.platform,)).compile(options).as_text()


@needs_compilers
@pytest.mark.parametrize("name", ["v5e:2x4", "h200:1x1x8"])
def test_ragged_all_to_all_compiles_forward_and_backward(name):
    text = compiled_gradient(name, RaggedAllToAllConfig())
    # Rows, choices and weights there, outputs back; their gradients the other way, but for the choices.
    assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)) == 7


@needs_compilers
@pytest.mark.parametrize(
    ("name", "implementation"), [("v5e:2x4", "tpu"), pytest.param("h200:1x1x8", "gpu", marks=pytest.mark.slow)]
)
def test_the_kernels_of_experts_compile_where_tokens_travel(name, implementation, monkeypatch):
    """Inside `shard_map`, forward and backward. No run takes them yet: they have not been timed on a device."""
    kernels = functools.partial(expert_mlp, implementation=implementation)
    monkeypatch.setattr(importlib.import_module("mdl.moe.dispatch"), "expert_mlp", kernels)
    text = compiled_gradient(name, AllToAllConfig(capacity_factor=None))
    assert text.count({"tpu": "tpu_custom_call", "gpu": "mosaic_gpu"}[implementation]) >= 9


def products_during_exchanges(text):
    """(instruction that ends an all-to-all, a product that is scheduled between its start and it), over the whole program."""
    program = Program(text)

    def products(instruction):
        if instruction.opcode in ("dot", "convolution"):
            yield instruction
        for name in instruction.called:
            for each in program.computations[name].values():
                yield from products(each)

    for computation in program.computations.values():
        schedule = list(computation.values())
        at = {each.name: position for position, each in enumerate(schedule)}
        for done in schedule:
            if done.opcode == "all-to-all-done":
                for each in schedule[at[done.operands[0]] : at[done.name]]:
                    yield from ((done, product) for product in products(each))


@needs_compilers
@pytest.mark.parametrize("capacity_factor", [pytest.param(None, marks=pytest.mark.slow), 1.25])
def test_one_part_travels_while_another_is_computed(capacity_factor):
    """The schedule for a TPU has products between the start and the end of an exchange, forward and backward."""
    transport = AllToAllConfig(capacity_factor=capacity_factor, num_parts=2)
    text = compiled_gradient("v5e:2x4", transport, tokens=256, width=256, options=COMPILER_OPTIONS["tpu"])
    found = {"transpose(" in done.attributes for done, _ in products_during_exchanges(text)}
    assert found == {False, True}


@needs_compilers
def test_shared_experts_are_computed_while_tokens_travel():
    """Of a layer in one part, whose room may not be enough, as DeepSeek-V3 trains it. Shared experts are known by their width."""
    target, width = cluster("v5e:2x4"), 384
    config = MoeConfig(
        moe_intermediate_size=128,
        n_shared_experts=3,
        router=RouterConfig(n_routed_experts=16, num_experts_per_tok=2),
        transport=AllToAllConfig(capacity_factor=1.25),
    )
    mesh = MeshConfig(data=2, expert=4).build(target.devices)
    with target.compiling(), jax.set_mesh(mesh):
        graph, state = nnx.split(
            nnx.eval_shape(lambda: config.build(256, init=Init(nnx.Rngs(0), 1.0, PrecisionConfig())))
        )

        def loss(state, x_BTD):
            return jnp.sum(nnx.merge(graph, state)(x_BTD)[0].astype(jnp.float32) ** 2)

        x = jax.ShapeDtypeStruct((8, 256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, spec("batch", None, None)))
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(state, x)
        text = traced.lower(lowering_platforms=("tpu",)).compile(COMPILER_OPTIONS["tpu"]).as_text()
    during = [(done, product) for done, product in products_during_exchanges(text)]
    of_shared = [done for done, product in during if any(width in array.dims for array in product.arrays)]
    assert of_shared
