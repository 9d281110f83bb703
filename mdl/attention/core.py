"""What every attention variant shares: where its tokens stand, and the call of the attention kernel on local shards."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas import flash_attention
from mdl import sharding


@dataclasses.dataclass(frozen=True)
class Context:
    """Where the tokens of this call stand; the same for every layer.

    positions_BT counts from 0 within a document; segment_ids_BT tells documents of one row apart, 0 is padding (None when a cache
    is used: a cached row is one document); rotary holds the cos and sin tables of these positions.
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    rotary: tuple[jax.Array, jax.Array]


def attend(q_BTNK: jax.Array, k_BSZK: jax.Array, v_BSZU: jax.Array, *, scale: float, context: Context) -> jax.Array:
    """Causal attention within documents, or over a cache whose slot s holds the key of position s; o_BTNU."""
    heads = sharding.spec("batch", None, "heads", None)
    rows = sharding.spec("batch", None)

    if context.segment_ids_BT is None:

        def cached(q_btnK, k_bSzK, v_bSzU, positions_bt):
            slots_bS = jnp.broadcast_to(jnp.arange(k_bSzK.shape[1], dtype=jnp.int32), k_bSzK.shape[:2])
            return flash_attention(
                q_btnK, k_bSzK, v_bSzU, scale=scale, q_positions_BT=positions_bt, kv_positions_BS=slots_bS
            )

        run = sharding.local(cached, in_specs=(heads, heads, heads, rows), out_specs=heads)
        return run(q_BTNK, k_BSZK, v_BSZU, context.positions_BT)

    def packed(q_btnK, k_btzK, v_btzU, segment_ids_bt):
        return flash_attention(
            q_btnK, k_btzK, v_btzU, scale=scale, q_segment_ids_BT=segment_ids_bt, kv_segment_ids_BS=segment_ids_bt
        )

    run = sharding.local(packed, in_specs=(heads, heads, heads, rows), out_specs=heads)
    return run(q_BTNK, k_BSZK, v_BSZU, context.segment_ids_BT)
