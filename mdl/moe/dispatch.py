"""Brings tokens to experts and back, inside `shard_map`: the one place that knows where experts live.

Rows are split over (data, fsdp, expert) and experts over `expert`, as in DeepSeek's expert parallelism. Dropless.
"""

import jax
from jax.sharding import PartitionSpec as P

from kernels_pallas import expert_mlp
from mdl import sharding
from mdl.moe.experts import Experts


def dispatch(x_BTD: jax.Array, index_BTX: jax.Array, weight_BTX: jax.Array, experts: Experts) -> jax.Array:
    """y_BTD = sum over x of weight_BTX * expert index_BTX of x_BTD; an index of E is no expert.

    Every device of the `expert` axis gathers the tokens of the others, computes those that chose its experts, and the partial sums
    are scattered back ("ring" transport: simple, no drops, traffic independent of the routing).
    """
    dtype = experts.precision.compute_dtype
    split = sharding.mesh_is_set()

    def local(x_btD, index_btX, weight_btX, gate_eDf, up_eDf, down_efD):
        if split:
            x_btD, index_btX, weight_btX = (
                jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x_btD, index_btX, weight_btX)
            )
            index_btX = index_btX - jax.lax.axis_index("expert") * gate_eDf.shape[0]
        shape, X = x_btD.shape, index_btX.shape[-1]
        y = expert_mlp(
            x_btD.reshape(-1, shape[-1]),
            index_btX.reshape(-1, X),
            weight_btX.reshape(-1, X).astype(dtype),
            gate_eDf,
            up_eDf,
            down_efD,
        )
        y_btD = y.reshape(shape)
        if split:
            y_btD = jax.lax.psum_scatter(y_btD, "expert", scatter_dimension=0, tiled=True)
            y_btD = jax.lax.psum(y_btD, "tensor")
        return y_btD

    parameters = (experts.gate_EDF, experts.up_EDF, experts.down_EFD)
    rows = P(sharding.ROWS, None, None)
    return sharding.local(
        local, in_specs=(rows, rows, rows, *(sharding.gathered(*p.axes) for p in parameters)), out_specs=rows
    )(
        x_BTD,
        index_BTX,
        weight_BTX,
        *(sharding.reshard(p[...].astype(dtype), sharding.gathered(*p.axes)) for p in parameters),
    )
