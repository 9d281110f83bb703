"""Text from a model, token by token: rows of a batch are decoded together, and take the next prompt as soon as theirs has ended."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from mdl import sharding
from mdl.decoding import State, advance, begin, blank, place
from mdl.pure import PureModel, Tree, apart
from mdl.sampling import Sampling
from mdl.transformer import Transformer, TransformerConfig

SMALLEST_LENGTH = 32  # of a padded prompt and of a cache


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


class Acceptance:
    """In how many steps of rows the drafts of depth 1, 2, ... were right, and those before them too."""

    def __init__(self, depth: int):
        self._depth = depth
        self.clear()

    def clear(self) -> None:
        self.steps, self._right = 0, [0] * self._depth

    def add(self, num_right: int) -> None:
        self.steps += 1
        for depth in range(num_right):
            self._right[depth] += 1

    @property
    def shares(self) -> list[float]:
        """Of the steps, for each depth; empty before the first one and without drafts."""
        return [right / self.steps for right in self._right if self.steps]


class Generator:
    """A model with its prefill and its decoding compiled for the shapes that come up; keeps no text between calls.

    Under a mesh (`jax.set_mesh`) rows are split over it, and every process makes the same calls and gets the same tokens.
    """

    def __init__(self, model: PureModel, arrays: Tree, *, drafts: bool = False, layers_apart: bool | None = None):
        """arrays: {"params": ..., "buffers": ...}; other keys are left alone.

        drafts: the MTP modules propose tokens, and the model reads several in one step: the same text in fewer steps.
        ValueError for a model without modules.
        layers_apart: decode without a scan over layers, with a copy of their parameters; None: on CPU
        only. XLA:CPU copies what a scan slices, every parameter for every token; other devices read slices where they lie.
        """
        self._config, self._depth = model.config, depth_of(model.config) if drafts else 0
        self.acceptance = Acceptance(self._depth)  # of all calls
        self._arrays = {name: arrays[name] for name in ("params", "buffers")}
        if jax.default_backend() == "cpu" if layers_apart is None else layers_apart:
            model, self._arrays = PureModel(model.config, layers_apart=True), apart(self._arrays)

        def merged(arrays: Tree) -> Transformer:
            return model.merge(arrays["params"], arrays["buffers"])

        def first(arrays, tokens_BT, lengths_B, seed_B, *, sampling):
            tokens_BT = sharding.reshard(tokens_BT, sharding.spec("batch", None))
            lengths_B, seed_B = (sharding.reshard(x, sharding.spec("batch")) for x in (lengths_B, seed_B))
            state = begin(merged(arrays), tokens_BT, lengths_B, seed_B, sampling, drafts=drafts)
            return sharding.reshard(state.token_B[:, None], P(None, None)), state

        def following(arrays, state, *, sampling):
            tokens_BT, taken_B, state = advance(merged(arrays), state, sampling)
            return sharding.reshard(tokens_BT, P(None, None)), sharding.reshard(taken_B, P(None)), state

        def placed(state, new, slot_B):
            return place(state, new, sharding.reshard(slot_B, sharding.spec("batch")))

        self._first = jax.jit(first, static_argnames="sampling")
        self._following = jax.jit(following, static_argnames="sampling", donate_argnames="state")
        self._blank = jax.jit(blank, static_argnums=(1, 2))
        self._placed = jax.jit(placed, donate_argnames="state")

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        rows: int | None = None,
        ended: Callable[[int], bool] = lambda index: False,
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of a prompt, its next tokens) until each has max_new_tokens or has `ended`, which is asked after each.

        seeds: one per prompt, below 2**32. rows: how many prompts are continued at the same time, None for all; the others wait
        for a row to end. The next step runs while the caller looks at this one's tokens. Raises ValueError as `check_prompts`
        before it compiles.
        """
        check_prompts(self._config, prompts, max_new_tokens)
        longest, limit = max(map(len, prompts)), self._config.max_position_embeddings
        # The drafts of the last step may lie behind the last position, and what does not fit whole is not written at all.
        length = min(bucket(longest + max_new_tokens + self._depth), limit + self._depth)
        width = min(power_of_two(longest), length)
        shards = math.prod(map(sharding.axis_size, sharding.ROWS))
        per_shard = -(-min(rows or len(prompts), len(prompts)) // shards)
        waiting = collections.deque(
            _Request(index, prompt, seed, max_new_tokens, max_new_tokens)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        )
        slots: list[_Request | None] = [None] * (shards * per_shard)
        coming: collections.deque[_Coming] = collections.deque()
        state: State | None = None
        while waiting or any(slots):
            while waiting and None in slots:
                new, slot_B = _admit(waiting, slots, shards)
                token_B1, begun = self._first(self._arrays, *_padded(new, width, shards), sampling=sampling)
                state = self._blank(begun, len(slots), length) if state is None else state
                state = self._placed(state, begun, slot_B)
                coming.append(_Coming.of(token_B1, None, new))
            running = {slot: request for slot, request in enumerate(slots) if request}
            goes_on = any(request.to_ask > 0 for request in running.values())
            if goes_on:
                tokens_BT, taken_B, state = self._following(self._arrays, state, sampling=sampling)
                coming.append(_Coming.of(tokens_BT, taken_B, running))
            while len(coming) > goes_on:
                for request, tokens in self._arrived(coming.popleft()):
                    yield request.index, tokens
                    if not request.to_give or ended(request.index):
                        request.is_over = True
                        slots[slots.index(request)] = None

    def _arrived(self, coming: "_Coming") -> Iterator[tuple["_Request", list[int]]]:
        """What the rows get that are not over, after waiting for it."""
        tokens_BT, is_step = np.asarray(coming.tokens_BT), coming.taken_B is not None
        taken_B = np.asarray(coming.taken_B) if is_step else np.ones(len(tokens_BT), np.int32)
        for row, request in coming.requests.items():
            if request.is_over:
                continue
            taken = int(taken_B[row])
            if is_step:
                self.acceptance.add(taken - 1)
            request.to_ask -= taken - 1
            tokens = tokens_BT[row, : min(taken, request.to_give)].tolist()
            request.to_give -= len(tokens)
            yield request, tokens


@dataclasses.dataclass(eq=False)
class _Request:
    index: int
    prompt: Sequence[int]
    seed: int
    to_ask: int  # tokens that no step has begun for, as far as it is known how many a step gives
    to_give: int  # tokens that the caller has not got
    is_over: bool = False


class _Coming(NamedTuple):
    """What a program that was started gives: tokens of these rows, and how many of them count, None behind a prompt: one."""

    tokens_BT: jax.Array
    taken_B: jax.Array | None
    requests: dict[int, _Request]

    @classmethod
    def of(cls, tokens_BT: jax.Array, taken_B: jax.Array | None, requests: dict[int, _Request]) -> "_Coming":
        for request in requests.values():
            request.to_ask -= 1
        return cls(tokens_BT, taken_B, requests)


def _admit(
    waiting: collections.deque[_Request], slots: list[_Request | None], shards: int
) -> tuple[dict[int, _Request], np.ndarray]:
    """Gives free slots to those that wait, at most one on each shard: {shard: request}, and where on its shard."""
    per_shard = len(slots) // shards
    new: dict[int, _Request] = {}
    slot_B = np.full(shards, per_shard, np.int32)  # which is nowhere
    for slot, taken in enumerate(slots):
        shard = slot // per_shard
        if taken is None and shard not in new and waiting:
            slots[slot] = new[shard] = waiting.popleft()
            slot_B[shard] = slot % per_shard
    return new, slot_B


def _padded(requests: dict[int, _Request], width: int, shards: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens_BT, lengths_B and seed_B, one row for each shard."""
    tokens_BT = np.zeros((shards, width), np.int32)
    lengths_B, seed_B = np.ones(shards, np.int32), np.zeros(shards, np.uint32)
    for shard, request in requests.items():
        tokens_BT[shard, : len(request.prompt)] = request.prompt
        lengths_B[shard], seed_B[shard] = len(request.prompt), request.seed
    return tokens_BT, lengths_B, seed_B


def depth_of(config: TransformerConfig) -> int:
    """How many tokens the MTP modules draft; ValueError for a model that has none."""
    if config.mtp is None:
        raise ValueError("the model has no MTP modules, which would draft")
    return config.mtp.num_nextn_predict_layers


def bucket(length: int) -> int:
    """The next of few lengths, four per octave: few programs to compile, and never more than a quarter too long."""
    step = max(SMALLEST_LENGTH, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def power_of_two(length: int) -> int:
    return max(SMALLEST_LENGTH, 1 << (length - 1).bit_length())
