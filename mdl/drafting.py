"""Drafts of the tokens to come, by MTP modules with a cache of their own (V3 report, sections 2.2 and 5.4.3).

A draft only proposes. The model chooses every token itself, from the same noise that it would choose from without drafts
(`sample_tokens`), and a draft is right if it is the chosen token: the text of a seed is the same with drafts and without, to
rounding, and so is its distribution (drafter-invariant speculative decoding, arXiv 2408.07978). Published rejection sampling
(arXiv 2211.17192) would keep the distribution only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mdl.attention.cache import Cache
from mdl.transformer import Transformer

DraftCache = dict[str, Cache]  # of each module; slot t has what the module read at t: h_t and the token after it


def empty_cache(model: Transformer, batch: int, length: int) -> DraftCache:
    dtype = model.precision.compute_dtype
    return {k: module.block.attention.empty_cache(batch, length, dtype) for k, module in model.mtp.items()}


def draft(
    model: Transformer,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    last_B: jax.Array,
    cache: DraftCache,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, Any]:
    """The tokens that each module in turn expects behind those of a row, [B, number of modules], and the cache with these T slots.

    hidden_BTD: the model's at consecutive positions_BT; tokens_BT: at t the token of position t + 1, known up to index last_B,
    the row's newest token. What stands behind it leaves leftovers in the cache, which no later query sees before they are written
    anew. Where a draft turns out wrong, deeper modules keep what they read of it: a worse guess later, never another text.
    choose: (logits [B, 1, V], positions [B, 1]) -> tokens [B, 1].
    """
    last_B1, index_T = last_B[:, None], jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    last_position_B1 = pick(positions_BT, last_B)[:, None]
    context, last_context = model.context(positions_BT, None), model.context(last_position_B1, None)
    drafts, new_cache = [], {}
    for depth, (k, module) in enumerate(model.mtp.items(), start=1):
        last_B1D = jnp.take_along_axis(hidden_BTD, last_B1[..., None], axis=1)
        newest_B1 = pick(tokens_BT, last_B)[:, None]
        # The cache gets all positions, a draft comes from the last: the compiler leaves out what nobody reads of the others.
        hidden_BTD, _, new_cache[k] = module(hidden_BTD, model.embed(tokens_BT), context, cache[k])
        last_B1D, _, new_cache[k] = module(last_B1D, model.embed(newest_B1), last_context, new_cache[k])
        drafts.append(choose(model.logits(last_B1D), last_position_B1 + 1 + depth))
        following_BT = jnp.concatenate([tokens_BT[:, 1:], drafts[-1]], axis=1)
        tokens_BT = jnp.where(index_T == last_B1, drafts[-1], following_BT)
    return jnp.concatenate(drafts, axis=1), new_cache


def pick(x_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    """x_BT[b, index_B[b]] of integers; a sum, since the sharding of a gather from one row of one column is ambiguous to JAX."""
    return jnp.sum(jnp.where(jnp.arange(x_BT.shape[1]) == index_B[:, None], x_BT, 0), axis=1, dtype=x_BT.dtype)
