"""Every device sees every token of the `expert` axis."""

import dataclasses

import jax
import jax.numpy as jnp

from mdl import sharding
from mdl.moe.transport import AXIS, Compute, Rows, Traffic, Transport


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingConfig(Transport):
    """All-gather and reduce-scatter: simple, no drops, traffic independent of the routing.

    Moves every token to every device: little more than needed while tokens choose about as many experts as there are devices.
    """

    def carry(self, rows: Rows, compute: Compute, experts_per_device: int) -> tuple[jax.Array, Traffic]:
        del experts_per_device
        everyones = jax.tree.map(lambda a: jax.lax.all_gather(a, AXIS, axis=0, tiled=True), rows)
        y_MD = jax.lax.psum_scatter(compute(everyones), AXIS, scatter_dimension=0, tiled=True)
        moved = rows.x_MD.shape[0] * sharding.axis_size(AXIS)
        return y_MD, Traffic(*(sharding.varying(jnp.int32(count)) for count in (moved, 0)))
