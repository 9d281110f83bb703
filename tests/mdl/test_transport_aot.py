"""The ragged transport is compiled for clusters that have its collective: for eight TPUs and for eight H200s."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from kernels_pallas import aot
from kernels_pallas.aot_cluster import cluster
from mdl.linear import Init
from mdl.moe.dispatch import dispatch
from mdl.moe.experts import Experts
from mdl.moe.transport_ragged import RaggedAllToAllConfig
from mdl.precision import PrecisionConfig
from mdl.sharding import MeshConfig, spec

AXES = {
    "gate_EDF": ("experts", "embed", "mlp"),
    "up_EDF": ("experts", "embed", "mlp"),
    "down_EFD": ("experts", "mlp", "embed"),
}
needs_compilers = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))


@needs_compilers
@pytest.mark.parametrize("name", ["v5e:2x4", "h200:1x1x8"])
def test_ragged_all_to_all_compiles_forward_and_backward(name):
    B, T, D, F, E, X = 8, 32, 128, 128, 8, 2
    target = cluster(name)
    experts = nnx.eval_shape(lambda: Experts(E, D, F, init=Init(nnx.Rngs(0), 1.0, PrecisionConfig())))
    graph, state = nnx.split(experts)
    mesh = MeshConfig(data=2, expert=4).build(target.devices)

    def argument(shape, axes, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*axes)))

    def loss(x, weight, matrices, index):
        nnx.replace_by_pure_dict(state, matrices)
        y, traffic = dispatch(x, index, weight, nnx.merge(graph, state), RaggedAllToAllConfig())
        return jnp.sum(y.astype(jnp.float32) ** 2), traffic

    rows = ("batch", None, None)
    shapes = nnx.to_pure_dict(state)
    matrices = {name: argument(shapes[name].shape, axes, jnp.float32) for name, axes in AXES.items()}
    arguments = (
        argument((B, T, D), rows, jnp.bfloat16),
        argument((B, T, X), rows, jnp.float32),
        matrices,
        argument((B, T, X), rows, jnp.int32),
    )
    with target.compiling(), jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        text = gradient.trace(*arguments).lower(lowering_platforms=(target.chip.platform,)).compile().as_text()
    # Rows, choices and weights there, outputs back; their gradients the other way, but for the choices.
    assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)) == 7
