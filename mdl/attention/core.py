"""What every attention variant shares: where its tokens stand, and the call of the attention kernel on local shards."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas import Mask, flash_attention
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

    def visible(self, num_keys: int) -> jax.Array:
        """Bool [B, T, S], what `attend` lets each query see: the earlier tokens of its document, or of a cache of S slots."""
        slots_S = jnp.arange(num_keys, dtype=jnp.int32)
        if self.segment_ids_BT is None:
            return slots_S <= self.positions_BT[:, :, None]
        ids_BT = self.segment_ids_BT
        same_BTS = (ids_BT[:, :, None] == ids_BT[:, None, :]) & (ids_BT > 0)[:, :, None]
        return same_BTS & (slots_S <= slots_S[:, None])


def attend(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array,
    *,
    scale: float,
    context: Context,
    selected_BTS: jax.Array | None = None,
) -> jax.Array:
    """Causal attention within documents, or over a cache whose slot s holds the key of position s; o_BTNU.

    selected_BTS, bool, leaves of the keys that a query would see only those for which it is True.
    """
    heads = sharding.spec("batch", None, "heads", None)
    rows, pairs = sharding.spec("batch", None), sharding.spec("batch", None, None)
    in_specs = (heads, heads, heads, rows, pairs)

    if context.segment_ids_BT is None:

        def cached(q_btnK, k_bSzK, v_bSzU, positions_bt, selected_btS):
            slots_bS = jnp.broadcast_to(jnp.arange(k_bSzK.shape[1], dtype=jnp.int32), k_bSzK.shape[:2])
            mask = Mask(causal=True, q_positions_BT=positions_bt, kv_positions_BS=slots_bS, selected_BTS=selected_btS)
            return flash_attention(q_btnK, k_bSzK, v_bSzU, scale=scale, mask=mask)

        run = sharding.local(cached, in_specs=in_specs, out_specs=heads)
        return run(q_BTNK, k_BSZK, v_BSZU, context.positions_BT, selected_BTS)

    def packed(q_btnK, k_btzK, v_btzU, segment_ids_bt, selected_btt):
        segments = {"q_segment_ids_BT": segment_ids_bt, "kv_segment_ids_BS": segment_ids_bt}
        mask = Mask(causal=True, selected_BTS=selected_btt, **segments)
        return flash_attention(q_btnK, k_btzK, v_btzU, scale=scale, mask=mask)

    run = sharding.local(packed, in_specs=in_specs, out_specs=heads)
    return run(q_BTNK, k_BSZK, v_BSZU, context.segment_ids_BT, selected_BTS)
