"""What every transport of tokens to experts shares.

Inside `shard_map`, `transport.carry(rows, compute, experts_per_device)` takes this device's tokens and returns their outputs;
`compute` runs this device's experts on whatever rows have come. A token travels at most once to each device, however many of its
experts are there, and what comes back is already summed over them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

AXIS = "expert"  # mesh axis over which experts are split


class Rows(NamedTuple):
    """Tokens with their experts, numbered over all devices, and the weights of these. A number outside [0, E) is no expert."""

    x_MD: jax.Array
    index_MX: jax.Array
    weight_MX: jax.Array


class Traffic(NamedTuple):
    """What one device counts, int32 scalars."""

    moved: jax.Array  # rows that it sent, those to itself included
    dropped: jax.Array  # choices of its tokens that found no room


Compute = Callable[[Rows], jax.Array]  # rows -> y_MD, zero for choices of other devices' experts
