"""Text from a model, token by token: prefill of prompts of unequal length, cached decoding, sampling."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mdl import sharding
from mdl.pure import PureModel, Tree, apart
from mdl.transformer import Transformer, TransformerConfig

SMALLEST_LENGTH = 32  # of a padded prompt and of a cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 0.0  # divides the logits; 0 takes the most likely token
    top_k: int | None = None  # choose among the k most likely tokens
    top_p: float | None = None  # then among the fewest whose probabilities sum to p

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


# --- pure functions ----------------------------------------------------------------------------------------------------------


def prefill(model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, length: int) -> tuple[jax.Array, Tree]:
    """Reads prompts into a new cache of `length` positions; (logits_BV of each row's next token, cache).

    Row b holds lengths_B[b] >= 1 tokens and padding to its right, which leaves leftovers in the cache that no later query sees.
    """
    positions_BT = jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1], dtype=jnp.int32),
        tokens_BT.shape,
        out_sharding=sharding.optional_sharding(sharding.spec("batch", None)),
    )
    output = model(tokens_BT, positions_BT, cache=_split_rows(model.empty_cache(tokens_BT.shape[0], length)))
    assert output.cache is not None
    last_BTD = jnp.take_along_axis(output.hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return model.logits(last_BTD)[:, 0], output.cache


def decode(model: Transformer, cache: Tree, token_B: jax.Array, position_B: jax.Array) -> tuple[jax.Array, Tree]:
    """Appends one token to each row, at its own position; (logits_BV of the token after it, cache)."""
    output = model(token_B[:, None], position_B[:, None], cache=cache)
    assert output.cache is not None
    return model.logits(output.hidden_BTD)[:, 0], output.cache


def sample_tokens(logits_BV: jax.Array, seed_B: jax.Array, position_B: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row, int32, in float32 arithmetic.

    The draw depends on the row's seed and on the position that the token will have, on nothing else: the same seed gives the same
    text in every batch.
    """
    whole = sharding.spec("batch", None)  # sorting needs the vocabulary in one piece
    run = sharding.local(
        functools.partial(_sample, sampling=sampling),
        in_specs=(whole, sharding.spec("batch"), sharding.spec("batch")),
        out_specs=sharding.spec("batch"),
        vary=sharding.ROWS,
    )
    return run(sharding.reshard(logits_BV, whole), seed_B, position_B)


def _sample(logits_BV: jax.Array, seed_B: jax.Array, position_B: jax.Array, sampling: Sampling) -> jax.Array:
    logits_BV = logits_BV.astype(jnp.float32)
    if sampling.temperature == 0:
        return _argmax(logits_BV)
    # The largest becomes 0 first, so that a tiny temperature overflows to -inf only.
    scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / sampling.temperature
    key_B = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seed_B, position_B)
    draw = jax.vmap(jax.random.categorical)
    if sampling.top_k is None and sampling.top_p is None:
        return draw(key_B, scaled_BV).astype(jnp.int32)
    candidates = min(sampling.top_k or scaled_BV.shape[-1], scaled_BV.shape[-1])
    sorted_BV, token_BV = jax.lax.top_k(scaled_BV, candidates)
    if sampling.top_p is not None:
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        more_likely_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        kept_BV = (more_likely_BV < sampling.top_p).at[:, 0].set(True)
        sorted_BV = jnp.where(kept_BV, sorted_BV, -jnp.inf)
    choice_B = draw(key_B, sorted_BV)
    return jnp.take_along_axis(token_BV, choice_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _argmax(logits_BV: jax.Array) -> jax.Array:
    """The first of the largest float32, as integers of the same order: XLA:CPU compares floats one by one, integers as vectors."""
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)
    V = order_BV.shape[-1]
    largest_BV = order_BV == jnp.max(order_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest_BV, jnp.arange(V, dtype=jnp.int32), V), axis=-1)


def _split_rows(cache: Tree) -> Tree:
    """An empty cache with its rows split as those of a batch; those of the stack come behind the layer axis."""

    def split(tree: Any, *leading: None) -> Any:
        return jax.tree.map(lambda buffer: sharding.reshard(buffer, P(*leading, sharding.RULES["batch"])), tree)

    stacked = "0" not in cache["stack"]
    return {"prefix": split(cache["prefix"]), "stack": split(cache["stack"], *(None,) * stacked)}


def check_prompts(config: TransformerConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """ValueError for prompts that a model cannot continue by so many tokens."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt without tokens cannot be continued; give at least one token, such as BOS")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest, limit = max(map(len, prompts)), config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} need {longest + max_new_tokens} positions; "
            f"max_position_embeddings is {limit}"
        )
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is not between 0 and vocab_size - 1 = {config.vocab_size - 1}")


# --- the loop ----------------------------------------------------------------------------------------------------------------


class Generator:
    """A model with its prefill and its decoding compiled for the shapes that come up; keeps nothing between calls.

    Under a mesh (`jax.set_mesh`) rows are split over it, and every process makes the same calls and gets the same tokens.
    """

    def __init__(self, model: PureModel, arrays: Tree, *, layers_apart: bool | None = None):
        """arrays: {"params": ..., "buffers": ...}; other keys are left alone.

        layers_apart: decode without a scan over layers, with a copy of their parameters; None: on CPU only. XLA:CPU copies what a
        scan slices, every parameter for every token, whereas other devices read slices where they lie.
        """
        self._config = model.config
        self._arrays = {name: arrays[name] for name in ("params", "buffers")}
        if jax.default_backend() == "cpu" if layers_apart is None else layers_apart:
            model, self._arrays = PureModel(model.config, layers_apart=True), apart(self._arrays)

        def merged(arrays: Tree) -> Transformer:
            return model.merge(arrays["params"], arrays["buffers"])

        def first(arrays, tokens_BT, lengths_B, seed_B, *, length, sampling):
            tokens_BT = sharding.reshard(tokens_BT, sharding.spec("batch", None))
            lengths_B, seed_B = (sharding.reshard(x, sharding.spec("batch")) for x in (lengths_B, seed_B))
            logits_BV, cache = prefill(merged(arrays), tokens_BT, lengths_B, length)
            token_B = sample_tokens(logits_BV, seed_B, lengths_B, sampling)
            return sharding.reshard(token_B, P(None)), _Rows(token_B, lengths_B, seed_B), cache

        def following(arrays, rows, cache, *, sampling):
            logits_BV, cache = decode(merged(arrays), cache, rows.token_B, rows.position_B)
            position_B = rows.position_B + 1
            token_B = sample_tokens(logits_BV, rows.seed_B, position_B, sampling)
            return sharding.reshard(token_B, P(None)), _Rows(token_B, position_B, rows.seed_B), cache

        self._first = jax.jit(first, static_argnames=("length", "sampling"))
        self._following = jax.jit(following, static_argnames="sampling", donate_argnames="cache")

    def stream(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """Yields the next token of every prompt, int32 [len(prompts)], up to max_new_tokens times.

        seeds: one per prompt, below 2**32. Rows that have ended are the caller's to ignore: close the iterator when all have. The
        next step runs while the caller looks at this one's tokens. Raises ValueError as `check_prompts` before it compiles.
        """
        check_prompts(self._config, prompts, max_new_tokens)
        limit = self._config.max_position_embeddings
        shards = math.prod(map(sharding.axis_size, sharding.ROWS))
        B = -(-len(prompts) // shards) * shards
        longest = max(map(len, prompts))
        tokens_BT = np.zeros((B, min(bucket(longest), limit)), np.int32)
        lengths_B, seed_B = np.ones(B, np.int32), np.zeros(B, np.uint32)
        for b, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            tokens_BT[b, : len(prompt)] = prompt
            lengths_B[b], seed_B[b] = len(prompt), seed
        length = min(bucket(longest + max_new_tokens), limit)
        shown_B, rows, cache = self._first(self._arrays, tokens_BT, lengths_B, seed_B, length=length, sampling=sampling)
        for _ in range(max_new_tokens - 1):
            shown = shown_B
            shown_B, rows, cache = self._following(self._arrays, rows, cache, sampling=sampling)
            yield np.asarray(shown)[: len(prompts)]
        yield np.asarray(shown_B)[: len(prompts)]


class _Rows(NamedTuple):
    """What rows carry besides their cache: the newest token, which the cache does not hold yet, and its position."""

    token_B: jax.Array
    position_B: jax.Array
    seed_B: jax.Array


def bucket(length: int) -> int:
    """The next of few lengths, four per octave: few programs to compile, and never more than a quarter too long."""
    step = max(SMALLEST_LENGTH, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step
