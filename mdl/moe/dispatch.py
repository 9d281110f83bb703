"""Brings tokens to experts and back, inside `shard_map`: the one place that knows where experts live.

Rows are split over (data, fsdp, expert) and experts over `expert`, as in DeepSeek's expert parallelism.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas import expert_mlp
from mdl import sharding
from mdl.moe.experts import Experts
from mdl.moe.transport import AXIS, Rows, Traffic
from mdl.moe.transport_all_to_all import AllToAllConfig
from mdl.moe.transport_ragged import EmulatedRaggedConfig, RaggedAllToAllConfig
from mdl.moe.transport_ring import RingConfig

TransportConfig = RingConfig | AllToAllConfig | RaggedAllToAllConfig | EmulatedRaggedConfig


def check_platform(transport: TransportConfig, platform: str) -> None:
    """Raises ValueError where the platform (as `jax.default_backend()` spells it) lacks the transport; it names those that work."""
    if platform not in transport.platforms:
        working = [member.__name__ for member in TransportConfig.__args__ if platform in member.platforms]
        raise ValueError(f"{type(transport).__name__} does not run on {platform}; {', '.join(working)} do")


def dispatch(
    x_BTD: jax.Array,
    index_BTX: jax.Array,
    weight_BTX: jax.Array,
    experts: Experts,
    transport: TransportConfig,
) -> tuple[jax.Array, Traffic]:
    """y_BTD = sum over x of weight_BTX * expert index_BTX of x_BTD, an index of E is no expert; and the traffic of all devices."""
    dtype = experts.precision.compute_dtype
    is_split = sharding.axis_size(AXIS) > 1
    if is_split and (platform := sharding.platform()):
        check_platform(transport, platform)

    matrices = (experts.gate_EDF, experts.up_EDF, experts.down_EFD)

    def local(x_btD, index_btX, weight_btX, *stored):
        gate_eDf, up_eDf, down_efD = (sharding.gather(w, dtype, *p.axes) for w, p in zip(stored, matrices, strict=True))
        own = Rows(*(a.reshape(-1, a.shape[-1]) for a in (x_btD, index_btX, weight_btX)))
        expected = own.index_MX.size // (transport.num_parts if is_split else 1)  # as many choices come as leave

        def compute(rows: Rows) -> jax.Array:
            first = jax.lax.axis_index(AXIS) * gate_eDf.shape[0] if sharding.mesh_is_set() else 0
            arrays = rows.x_MD, rows.index_MX - first, rows.weight_MX, gate_eDf, up_eDf, down_efD
            return expert_mlp(*arrays, expected_choices=expected)

        if is_split:
            y_MD, traffic = transport.carry_in_parts(own, compute, gate_eDf.shape[0])
        else:
            y_MD, traffic = compute(own), Traffic(jnp.int32(0), jnp.int32(0))
        if sharding.mesh_is_set():
            y_MD = jax.lax.psum(y_MD, "tensor")
            traffic = jax.tree.map(
                lambda n: jax.lax.pmax(jax.lax.psum(sharding.varying(n), sharding.ROWS), "tensor"), traffic
            )
        return y_MD.reshape(x_btD.shape), traffic

    rows = P(sharding.ROWS, None, None)
    return sharding.local(
        local,
        in_specs=(rows, rows, rows, *(sharding.spec(*p.axes) for p in matrices)),
        out_specs=(rows, P()),
    )(
        x_BTD,
        index_BTX,
        weight_BTX.astype(dtype),
        *(p[...] for p in matrices),
    )
