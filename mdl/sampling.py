"""The choice of the next token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mdl import sharding
from mdl.transformer import Transformer

POSITIONS = 128  # of a row, whose logits are held at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 0.0  # divides the logits; 0 takes the most likely token
    top_k: int | None = None  # choose among the k most likely tokens
    top_p: float | None = None  # then among the fewest whose probabilities sum to p

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def sample_tokens(logits_BTV: jax.Array, seed_B: jax.Array, positions_BT: jax.Array, sampling: Sampling) -> jax.Array:
    """The tokens that these positions get, int32 [B, T], in float32 arithmetic.

    The token of a position is the one of the largest log p + noise (Gumbel), where each token's noise depends on the row's seed
    and the position, on nothing else: the same seed gives the same text in every batch, and whatever was drafted. Two
    distributions that are alike mostly have the same token then, which is what drafts need.
    """
    # Sorting needs the vocabulary in one piece.
    whole, rows = sharding.spec("batch", None, None), sharding.spec("batch")
    run = sharding.local(
        functools.partial(_sample, sampling=sampling),
        in_specs=(whole, rows, rows),
        out_specs=rows,
        vary=sharding.ROWS,
    )
    return run(sharding.reshard(logits_BTV, whole), seed_B, positions_BT)


def _sample(logits_BTV: jax.Array, seed_B: jax.Array, positions_BT: jax.Array, sampling: Sampling) -> jax.Array:
    logits_BTV = logits_BTV.astype(jnp.float32)
    if sampling.temperature == 0:
        return _argmax(logits_BTV)
    # The largest becomes 0 first, so that a tiny temperature overflows to -inf only.
    scaled_BTV = (logits_BTV - jnp.max(logits_BTV, axis=-1, keepdims=True)) / sampling.temperature
    V = scaled_BTV.shape[-1]

    def noise_of(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (V,))

    noise_BTV = jax.vmap(jax.vmap(noise_of, (None, 0)))(seed_B, positions_BT)
    if sampling.top_k is None and sampling.top_p is None:
        return _argmax(scaled_BTV + noise_BTV)
    sorted_BTV, token_BTV = jax.lax.top_k(scaled_BTV, min(sampling.top_k or V, V))
    if sampling.top_p is not None:
        probability_BTV = jax.nn.softmax(sorted_BTV, axis=-1)
        more_likely_BTV = jnp.cumsum(probability_BTV, axis=-1) - probability_BTV
        kept_BTV = (more_likely_BTV < sampling.top_p).at[..., 0].set(True)
        sorted_BTV = jnp.where(kept_BTV, sorted_BTV, -jnp.inf)
    choice_BT = _argmax(sorted_BTV + jnp.take_along_axis(noise_BTV, token_BTV, axis=-1))
    return jnp.take_along_axis(token_BTV, choice_BT[..., None], axis=-1)[..., 0].astype(jnp.int32)


def _argmax(x_BTV: jax.Array) -> jax.Array:
    """The first of the largest float32, as integers of the same order: XLA:CPU compares floats one by one, integers as vectors."""
    bits_BTV = jax.lax.bitcast_convert_type(x_BTV, jnp.int32)
    order_BTV = jnp.where(bits_BTV < 0, bits_BTV ^ 0x7FFFFFFF, bits_BTV)
    V = order_BTV.shape[-1]
    largest_BTV = order_BTV == jnp.max(order_BTV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest_BTV, jnp.arange(V, dtype=jnp.int32), V), axis=-1)


def most_likely(model: Transformer, hidden_BTD: jax.Array) -> jax.Array:
    """The most likely token after each position, of some positions at a time: [B, T, V] logits never exist."""

    def of_part(hidden_BTD: jax.Array) -> jax.Array:
        logits_BTV = sharding.reshard(model.logits(hidden_BTD), sharding.spec("batch", None, None))
        return _argmax(logits_BTV.astype(jnp.float32))

    B, T, D = hidden_BTD.shape
    if T <= POSITIONS:
        return of_part(hidden_BTD)
    padded_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, -T % POSITIONS), (0, 0)))
    parts = jnp.moveaxis(padded_BTD.reshape(B, -1, POSITIONS, D), 1, 0)
    return jnp.moveaxis(jax.lax.map(of_part, parts), 0, 1).reshape(B, -1)[:, :T]
