"""Cached decoding of rows that stand at positions of their own: pure functions, to be jitted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mdl import sharding
from mdl.drafting import draft, empty_cache, pick
from mdl.pure import Tree
from mdl.sampling import Sampling, sample_tokens
from mdl.transformer import Transformer


class Read(NamedTuple):
    """What the model makes of tokens that it has just read."""

    logits_BTV: jax.Array  # of the token after each; of a prompt after its last alone, [B, 1, V]
    hidden_BTD: jax.Array
    cache: Tree


def prefill(model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, length: int) -> Read:
    """Reads prompts into a new cache of `length` positions.

    Row b holds lengths_B[b] >= 1 tokens and padding to its right, which leaves leftovers in the cache that no later query sees.
    """
    cache = _by_rows(_split, model.empty_cache(tokens_BT.shape[0], length))
    output = model(tokens_BT, _positions(tokens_BT), cache=cache)
    assert output.cache is not None
    last_BTD = jnp.take_along_axis(output.hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return Read(model.logits(last_BTD), output.hidden_BTD, output.cache)


def decode(model: Transformer, cache: Tree, tokens_BT: jax.Array, position_B: jax.Array) -> Read:
    """Appends a few tokens to each row, the first of them at position_B."""
    output = model(tokens_BT, position_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), cache=cache)
    assert output.cache is not None
    return Read(model.logits(output.hidden_BTD), output.hidden_BTD, output.cache)


# --- the state of a batch ----------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Where rows stand: the newest token, which no cache holds yet, its position, and what may come after it."""

    token_B: jax.Array
    position_B: jax.Array
    seed_B: jax.Array
    drafts_BT: jax.Array | None  # a token of each MTP module, where those draft
    cache: Tree  # of the layers; of the modules as "mtp", which is empty where they do not draft


def begin(
    model: Transformer,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    seed_B: jax.Array,
    sampling: Sampling,
    *,
    drafts: bool,
) -> State:
    """Reads prompts, as `prefill` does, into a cache of their padded length, and chooses the token after each."""
    B, T = tokens_BT.shape
    read = prefill(model, tokens_BT, lengths_B, T)
    token_B = sample_tokens(read.logits_BTV, seed_B, lengths_B[:, None], sampling)[:, 0]
    state = State(token_B, lengths_B, seed_B, None, read.cache | {"mtp": {}})
    if not drafts:
        return state
    is_last_BT = jnp.arange(T, dtype=jnp.int32) == lengths_B[:, None] - 1
    following_BT = jnp.concatenate([tokens_BT[:, 1:], token_B[:, None]], axis=1)
    following_BT = jnp.where(is_last_BT, token_B[:, None], following_BT)
    modules = _by_rows(_split, {"mtp": empty_cache(model, B, T)})
    return _with_drafts(model, state, read, following_BT, _positions(tokens_BT), lengths_B - 1, modules, sampling)


def advance(model: Transformer, state: State, sampling: Sampling) -> tuple[jax.Array, jax.Array, State]:
    """Reads the newest token of each row and the drafts behind it: (tokens_BT, how many of them each row takes, state).

    A row takes what the model chooses after its newest token, and after each draft as long as all so far were right.
    """
    tokens_BT = state.token_B[:, None]
    if state.drafts_BT is not None:
        tokens_BT = jnp.concatenate([tokens_BT, state.drafts_BT], axis=1)
    positions_BT = state.position_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    read = decode(model, state.cache, tokens_BT, state.position_B)
    chosen_BT = sample_tokens(read.logits_BTV, state.seed_B, positions_BT + 1, sampling)
    is_right_BT = (chosen_BT[:, :-1] == tokens_BT[:, 1:]).astype(jnp.int32)
    right_B = jnp.sum(jnp.cumprod(is_right_BT, axis=1), axis=1)
    token_B = pick(chosen_BT, right_B)
    new = State(token_B, state.position_B + right_B + 1, state.seed_B, None, read.cache | {"mtp": {}})
    if state.drafts_BT is not None:
        modules = {"mtp": state.cache["mtp"]}
        new = _with_drafts(model, new, read, chosen_BT, positions_BT, right_B, modules, sampling)
    return chosen_BT, right_B + 1, new


def _with_drafts(
    model: Transformer,
    state: State,
    read: Read,
    following_BT: jax.Array,
    positions_BT: jax.Array,
    last_B: jax.Array,
    modules: Tree,
    sampling: Sampling,
) -> State:
    def choose(logits_BTV: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return sample_tokens(logits_BTV, state.seed_B, positions_BT, sampling)

    drafts_BT, cache = draft(model, read.hidden_BTD, following_BT, positions_BT, last_B, modules["mtp"], choose)
    return state._replace(drafts_BT=drafts_BT, cache=read.cache | {"mtp": cache})


# --- rows that come and go ---------------------------------------------------------------------------------------------------


def blank(like: State, batch: int, length: int) -> State:
    """Rows of no prompt, with caches of `length` positions, for those of `like` to be placed into."""

    def empty(value: jax.Array, axis: int, *dims: int) -> jax.Array:
        shape = (*value.shape[:axis], *dims, *value.shape[axis + len(dims) :])
        zero = jnp.zeros((), value.dtype)
        return jnp.broadcast_to(zero, shape, out_sharding=sharding.optional_sharding(sharding.spec_of(value)))

    rows = jax.tree.map(lambda value: empty(value, 0, batch), like._replace(cache={}))
    return rows._replace(cache=_by_rows(lambda value, axis: empty(value, axis, batch, length), like.cache))


def place(state: State, new: State, slot_B: jax.Array) -> State:
    """`state` with new rows in it: one of each device that rows are split over, at slot_B of its own rows; beyond them nowhere."""

    def put(buffer: jax.Array, value: jax.Array, axis: int) -> jax.Array:
        split = sharding.spec_of(value)

        def locally(buffer: jax.Array, value: jax.Array, slot_b: jax.Array) -> jax.Array:
            rest = (slice(0, size) for size in value.shape[axis + 1 :])
            at = (*(slice(None),) * axis, slot_b[0], *rest)
            return buffer.at[at].set(jnp.squeeze(value, axis), mode="drop")

        in_specs = (split, split, sharding.spec("batch"))
        return sharding.local(locally, in_specs, split, vary=sharding.ROWS)(buffer, value, slot_B)

    rows = jax.tree.map(lambda *leaves: put(*leaves, axis=0), state._replace(cache={}), new._replace(cache={}))
    return rows._replace(cache=_by_rows(put, state.cache, new.cache))


def _by_rows(fn: Callable[..., jax.Array], cache: Tree, *others: Tree) -> Tree:
    """fn(buffers..., axis of the rows) of each buffer of a cache; those of a scanned stack have the layers in front."""

    def part(name: str, tree: Any, *others: Any) -> Any:
        axis = 1 if name == "stack" and "0" not in tree else 0
        return jax.tree.map(lambda *buffers: fn(*buffers, axis), tree, *others)

    return {name: part(name, tree, *(other[name] for other in others)) for name, tree in cache.items()}


def _split(buffer: jax.Array, axis: int) -> jax.Array:
    """An empty buffer with its rows split as those of a batch."""
    return sharding.reshard(buffer, P(*(None,) * axis, sharding.RULES["batch"]))


def _positions(tokens_BT: jax.Array) -> jax.Array:
    return jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1], dtype=jnp.int32),
        tokens_BT.shape,
        out_sharding=sharding.optional_sharding(sharding.spec("batch", None)),
    )
