"""What every attention variant shares: where its tokens stand, and the call of the attention kernel on local shards."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas import Mask, flash_attention
from mdl import sharding

Measure = Literal["nothing", "loss", "recall"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Where the tokens of this call stand; the same for every layer.

    positions_BT counts from 0 within a document; segment_ids_BT tells documents of one row apart, 0 is padding (None when a cache
    is used: a cached row is one document); rotary holds the cos and sin tables of these positions.
    measure: what sparse attention says of its indexer: nothing, what the indexer's loss needs, or the recall too, which takes
    dense attention.
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    rotary: tuple[jax.Array, jax.Array]
    measure: Measure = dataclasses.field(default="nothing", metadata={"static": True})

    def mask(self, num_keys: int) -> Mask:
        """What each query may see: the earlier tokens of its document, or of a cache whose slot s holds the key of position s."""
        if self.segment_ids_BT is not None:
            return Mask(causal=True, q_segment_ids_BT=self.segment_ids_BT, kv_segment_ids_BS=self.segment_ids_BT)
        slots_BS = jnp.broadcast_to(
            jnp.arange(num_keys, dtype=jnp.int32),
            (self.positions_BT.shape[0], num_keys),
            out_sharding=sharding.optional_sharding(sharding.spec("batch", None)),
        )
        return Mask(causal=True, q_positions_BT=self.positions_BT, kv_positions_BS=slots_BS)


def attend(
    q_BTNK: jax.Array, k_BSZK: jax.Array, v_BSZU: jax.Array, *, scale: float, mask: Mask
) -> tuple[jax.Array, jax.Array]:
    """o_BTNU and the logsumexp of its logits, lse_BTN."""
    heads = sharding.spec("batch", None, "heads", None)

    def attend_locally(q_btnK, k_bSzK, v_bSzU, mask: Mask) -> tuple[jax.Array, jax.Array]:
        return flash_attention(q_btnK, k_bSzK, v_bSzU, scale=scale, mask=mask, return_lse=True)

    run = sharding.local(
        attend_locally,
        in_specs=(heads, heads, heads, sharding.spec("batch")),
        out_specs=(heads, sharding.spec("batch", None, "heads")),
    )
    return run(q_BTNK, k_BSZK, v_BSZU, mask)
