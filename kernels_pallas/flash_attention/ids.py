"""What segment ids and positions let a tile of queries see of a tile of keys, before any kernel runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.flash_attention.mask import Mask


class Ids(NamedTuple):
    """What a mask compares beside indices, of both sides: arrays, their blocks or their refs."""

    q_segments: Any = None
    kv_segments: Any = None
    q_positions: Any = None
    kv_positions: Any = None

    @classmethod
    def of(cls, mask: Mask, num_queries: int, num_keys: int) -> "Ids":
        """int32 [B, num_queries] and [B, num_keys], padded to these; what is padded is in no segment."""

        def padded(ids_BT: jax.Array, length: int, mode: str) -> jax.Array:
            return jnp.pad(ids_BT.astype(jnp.int32), ((0, 0), (0, length - ids_BT.shape[1])), mode)

        q_segments = kv_segments = q_positions = kv_positions = None
        if mask.q_segment_ids_BT is not None and mask.kv_segment_ids_BS is not None:
            q_segments = padded(mask.q_segment_ids_BT, num_queries, "constant")
            kv_segments = padded(mask.kv_segment_ids_BS, num_keys, "constant")
        if mask.ordered and mask.q_positions_BT is not None and mask.kv_positions_BS is not None:
            q_positions = padded(mask.q_positions_BT, num_queries, "edge")
            kv_positions = padded(mask.kv_positions_BS, num_keys, "edge")
        return cls(q_segments, kv_segments, q_positions, kv_positions)

    def seen(self, mask: Mask, sizes: tuple[int, int], blocks: tuple[np.ndarray, np.ndarray]) -> tuple[Any, Any]:
        """Whether some and whether all queries of a block see its keys, in each row of the batch [B, *blocks].

        `sizes` of a block of queries and of keys, `blocks` their indices, broadcast together. By the least and greatest ids of
        each block: of a few blocks too many it says some, of none too many all.
        """

        def both(extremes: Any, q_BT: jax.Array, kv_BS: jax.Array) -> list[jax.Array]:
            sides = zip((q_BT, kv_BS), sizes, blocks, strict=True)
            return [extremes(a.reshape(a.shape[0], -1, size))[:, at] for a, size, at in sides]

        some, every = True, True
        if self.q_positions is not None:
            some, every = mask.near(*both(_extremes, self.q_positions, self.kv_positions))
        if self.q_segments is not None:
            q, kv = both(_extremes_and_padding, self.q_segments, self.kv_segments)
            some &= (kv[..., 0] <= q[..., 1]) & (kv[..., 1] >= q[..., 0])
            every &= (q == kv).all(-1) & (q[..., 0] == q[..., 1]) & (q[..., 2] == 0)
        return some, every


def _extremes(a: jax.Array) -> jax.Array:
    return jnp.stack([a.min(-1), a.max(-1)], -1)


def _extremes_and_padding(a: jax.Array) -> jax.Array:
    """The least and greatest id that is no padding, and 1 if there is padding."""
    padding, most = a == 0, np.iinfo(np.int32).max
    return jnp.stack([jnp.where(padding, most, a).min(-1), jnp.where(padding, -most, a).max(-1), padding.any(-1)], -1)
