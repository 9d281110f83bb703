"""Transports compiled for what is not there: eight TPUs, eight H200s."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from experiments.compilation.hlo import Program
from kernels_pallas import aot
from kernels_pallas.aot_cluster import cluster
from mdl.linear import Init
from mdl.moe.dispatch import dispatch
from mdl.moe.experts import Experts
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
def test_one_part_travels_while_another_is_computed():
    """The schedule for a TPU has products between the start and the end of an exchange, forward and backward."""
    options = {"xla_tpu_enable_async_all_to_all": "true"}  # off by default
    transport = AllToAllConfig(capacity_factor=None, num_parts=2)
    program = Program(compiled_gradient("v5e:2x4", transport, tokens=256, width=256, options=options))
    multiplying = {
        name
        for name, computation in program.computations.items()
        if any(each.opcode in ("dot", "convolution") for each in computation.values())
    }
    schedule = list(program.computations[program.entry].values())
    at = {each.name: position for position, each in enumerate(schedule)}
    overlapping = set()
    for done in schedule:
        if done.opcode == "all-to-all-done":
            between = schedule[at[done.operands[0]] : at[done.name]]
            if any(each.opcode in ("dot", "convolution") or multiplying & {*each.called} for each in between):
                overlapping.add("backward" if "transpose(" in done.attributes else "forward")
    assert overlapping == {"forward", "backward"}
