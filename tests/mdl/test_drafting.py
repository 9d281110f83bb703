"""Drafts of MTP modules: never another text, right as often as they should be, from caches that equal full passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from mdl.decoding import advance, begin
from mdl.generate import Generator
from mdl.pure import PureModel
from mdl.sampling import Sampling, most_likely, sample_tokens
from mdl.sharding import MeshConfig

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, models.V, length).tolist() for length in (5, 20, 1, 12)]
SEEDS = [3, 1, 4, 1]
GREEDY, DRAWN = Sampling(), Sampling(temperature=0.9, top_k=20, top_p=0.9)
# Half the time to compile, and nothing here runs long.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# Two modules, each of which reads what the one before it drafted; and one in a model of every kind of layer.
CONFIGS = {"dense": dataclasses.replace(models.V3, moe=None, num_hidden_layers=2), "v32": models.V32}


@functools.cache
def foreseeing(name: str):
    """Parameters with which drafts are right now and then: layers add little to what the newest token says, and modules read it."""

    def leaf(path, array):
        name = jax.tree_util.keystr(path)
        if name.endswith("['eh_proj']['weight']"):
            return np.eye(*array.shape, dtype=np.float32) + 0.1 * array
        return 0.4 * array if "o_proj" in name or "down" in name else array

    return jax.tree_util.tree_map_with_path(leaf, models.parameters(CONFIGS[name]))


@functools.cache
def generator(name: str, *, drafts: bool) -> Generator:
    return quick_generator(models.pure(CONFIGS[name]), foreseeing(name), drafts=drafts)


def quick_generator(*args, **options) -> Generator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        return Generator(*args, **options)


def continued(generator: Generator, sampling: Sampling, *, rows=None) -> list[list[int]]:
    """Twelve tokens for each prompt."""
    texts: list[list[int]] = [[] for _ in PROMPTS]
    for index, tokens in generator.stream(PROMPTS, max_new_tokens=12, sampling=sampling, seeds=SEEDS, rows=rows):
        texts[index] += tokens
    assert all(len(text) == 12 for text in texts)
    return texts


# --- the same text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sampling"), [("dense", DRAWN), ("dense", GREEDY), pytest.param("v32", DRAWN, marks=pytest.mark.slow)]
)
def test_the_text_is_the_same_with_drafts(name, sampling):
    """Rows of unequal length that accept unequal numbers, some of which wait for others to end."""
    drafting = generator(name, drafts=True)
    drafting.acceptance.clear()
    expected = continued(generator(name, drafts=False), sampling)
    assert continued(drafting, sampling) == expected
    shares = drafting.acceptance.shares
    assert len(shares) == CONFIGS[name].mtp.num_nextn_predict_layers
    assert all(0.05 < share < 0.95 for share in shares), shares  # else nothing was tried here
    if name == "dense":
        assert continued(drafting, sampling, rows=2) == expected


def test_every_position_can_be_used():
    """20 + 12 tokens, the last step's drafts behind them."""
    with pytest.MonkeyPatch.context() as patch:
        drafting = generator("dense", drafts=True)
        patch.setattr(drafting, "_config", dataclasses.replace(CONFIGS["dense"], max_position_embeddings=32))
        assert continued(drafting, GREEDY) == continued(generator("dense", drafts=False), GREEDY)


def test_eight_devices_equal_one():
    """Four rows on four pairs of devices."""
    pure, built = models.pure(CONFIGS["dense"]), MeshConfig(data=2, fsdp=2, tensor=2).build()
    expected = continued(generator("dense", drafts=False), DRAWN)
    with jax.set_mesh(built):
        arrays = jax.tree.map(
            lambda array, leaf: jax.device_put(array, jax.sharding.NamedSharding(built, leaf.sharding.spec)),
            foreseeing("dense"),
            PureModel(pure.config).abstract(),
        )
        assert continued(quick_generator(pure, arrays, drafts=True), DRAWN) == expected


def test_a_model_without_modules_is_refused():
    with pytest.raises(ValueError, match="no MTP modules"):
        Generator(models.pure(models.V2), models.parameters(models.V2), drafts=True)


# --- the same distribution ---------------------------------------------------------------------------------------------------


def merged(name: str):
    arrays = jax.tree.map(jnp.asarray, foreseeing(name))
    return models.pure(CONFIGS[name]).merge(arrays["params"], arrays["buffers"])


def logits_of(name: str, rows: np.ndarray) -> np.ndarray:
    """After the last token of each row, by a full pass."""

    @quick_jit
    def run(tokens_BT):
        model = merged(name)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return model.logits(model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)).hidden_BTD[:, -1:])[:, 0]

    return np.asarray(run(rows), np.float64)


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    p = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return p / p.sum(-1, keepdims=True)


def test_drafted_tokens_follow_the_distribution_of_the_model():
    """The second and third token behind one prompt, by 6,000 seeds, against all that could be there."""
    draws, temperature, prompt = 6000, 0.7, PROMPTS[0]
    sampling = Sampling(temperature=temperature)
    first = probabilities(logits_of("dense", np.array([prompt])), temperature)[0]
    behind = probabilities(
        logits_of("dense", np.array([[*prompt, token] for token in range(models.V)], np.int32)), temperature
    )
    expected = first @ behind  # of the second token: the first one that a step verifies a draft for

    @quick_jit
    def run(seed_B):
        tokens_BT = jnp.broadcast_to(jnp.array([*prompt, 0, 0, 0], jnp.int32), (draws, len(prompt) + 3))
        lengths_B = jnp.full(draws, len(prompt), jnp.int32)
        state = begin(merged("dense"), tokens_BT, lengths_B, seed_B, sampling, drafts=True)
        return state.token_B, state.drafts_BT, advance(merged("dense"), state, sampling)[:2]

    token_B, drafts_BT, (chosen_BT, taken_B) = jax.device_get(run(np.arange(draws, dtype=np.uint32)))
    is_right_B = drafts_BT[:, 0] == chosen_BT[:, 0]
    assert 0.2 < is_right_B.mean() < 0.95
    np.testing.assert_array_equal(taken_B > 1, is_right_B)
    for tokens, share in ((token_B, first), (chosen_BT[:, 0], expected)):
        counts = np.bincount(tokens, minlength=models.V)
        deviation = np.sqrt(draws * share * (1 - share)) + 1
        assert np.all(np.abs(counts - draws * share) < 4.5 * deviation)
        many = draws * share > 5  # chi-square where it holds; four and a half deviations of its own
        chi_square = np.sum(np.square(counts - draws * share)[many] / (draws * share)[many])
        assert chi_square < many.sum() + 4.5 * np.sqrt(2 * many.sum())


def test_noise_in_common_makes_drafts_right_more_often_than_chance():
    """Two alike distributions choose the same token with probability sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    rng, draws = np.random.default_rng(1), 20_000
    logits = rng.normal(size=(2, 12)).astype(np.float32) * 0.5 + rng.normal(size=12).astype(np.float32)
    p, q = probabilities(logits, 1.0)
    expected = np.sum(1 / np.sum(np.maximum(p[None] / p[:, None], q[None] / q[:, None]), axis=1))
    seed_B, position_BT = np.arange(draws, dtype=np.uint32), np.zeros((draws, 1), np.int32)
    ours, theirs = (
        sample_tokens(np.broadcast_to(row, (draws, 1, 12)), seed_B, position_BT, Sampling(temperature=1.0))
        for row in logits
    )
    assert expected > p @ q + 0.2
    assert abs(np.mean(np.asarray(ours) == np.asarray(theirs)) - expected) < 4.5 * np.sqrt(expected / draws)


# --- what modules read -------------------------------------------------------------------------------------------------------


def test_drafts_are_those_of_a_full_pass():
    """Behind prompts of unequal length all of them; after each step the first, whose module has read true tokens only."""
    B, T, lengths = 4, 32, np.array([len(prompt) for prompt in PROMPTS], np.int32)
    rows = np.full((B, T), models.V - 1, np.int32)  # padding that would show if anything saw it
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    seed_B, positions_BT = np.zeros(B, np.uint32), np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    state = quick_jit(lambda *args: begin(merged("dense"), *args, GREEDY, drafts=True))(rows, lengths, seed_B)
    step = quick_jit(lambda state: advance(merged("dense"), state, GREEDY))

    @quick_jit
    def full(tokens_BT):
        """The most likely token for each module at each position."""
        model, valid_BT = merged("dense"), jnp.ones((B, T), jnp.int32)
        hidden_BTD = model(tokens_BT, positions_BT, valid_BT).hidden_BTD
        ahead = model.predict_ahead(hidden_BTD, jnp.roll(tokens_BT, -1, axis=1), positions_BT, valid_BT)
        return [jnp.argmax(model.logits(ahead_BTD), axis=-1) for ahead_BTD, _ in ahead]

    for i in range(5):
        ends = np.asarray(state.position_B)
        rows[np.arange(B), ends] = state.token_B
        at = np.arange(B), ends - 1
        np.testing.assert_array_equal(state.drafts_BT[:, 0], full(rows)[0][at])
        if i == 0:
            rows[np.arange(B), ends + 1] = state.drafts_BT[:, 0]
            np.testing.assert_array_equal(state.drafts_BT[:, 1], full(rows)[1][at])
        tokens_BT, taken_B, state = step(state)
        for row, end, tokens, taken in zip(rows, ends, np.asarray(tokens_BT), np.asarray(taken_B), strict=True):
            row[end + 1 : end + 1 + taken] = tokens[:taken]


@pytest.mark.parametrize("length", [7, 128, 300])
def test_the_most_likely_tokens_of_long_rows(length):
    hidden_BTD = np.random.default_rng(2).normal(size=(2, length, 16)).astype(np.float32)
    model = merged("dense")
    np.testing.assert_array_equal(most_likely(model, hidden_BTD), np.argmax(hidden_BTD @ model.head[...], axis=-1))
