"""Cached decoding against full forward passes and golden continuations; sampling against a NumPy reference."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from experiments.loading import LoadedModel, find_model
from mdl.decoding import decode, prefill
from mdl.generate import Generator, bucket, check_prompts, power_of_two
from mdl.pure import PureModel
from mdl.sampling import Sampling, sample_tokens
from mdl.sharding import MeshConfig
from mdl.transformer import TransformerConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DENSE = dataclasses.replace(models.QWEN, moe=None, mtp=None)


def sparse(**attention) -> TransformerConfig:
    """Two layers."""
    attention = dataclasses.replace(models.V32.attention, **attention)
    return dataclasses.replace(models.V32, num_hidden_layers=2, attention=attention, moe=None, mtp=None)


CONFIGS = {
    **models.CONFIGS,
    "v32_fp8": models.V32_FP8,
    "unrolled": dataclasses.replace(models.V3, scan_layers=False),
    "dense": DENSE,
    "sparse_window": sparse(index_window=2),
    "sparse_gqa": sparse(dense=DENSE.attention, index_window=1),
    "sparse_shared": sparse(indexer_types=("full", "shared"), indexer_rope_interleave=True),
}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, models.V, length).tolist() for length in (5, 20, 1, 12)]
GREEDY = Sampling()
# Half the time to compile, and nothing here runs long.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SLOW = {"sparse_window"}
all_configs = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CONFIGS]
)


@functools.cache
def generator(name: str) -> Generator:
    return Generator(models.pure(CONFIGS[name]), models.parameters(CONFIGS[name]))


def continued(
    generator: Generator, prompts, *, sampling=GREEDY, seeds=None, max_new_tokens=8, rows=None
) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in prompts]
    seeds = [0] * len(prompts) if seeds is None else seeds
    for index, tokens in generator.stream(
        prompts, max_new_tokens=max_new_tokens, sampling=sampling, seeds=seeds, rows=rows
    ):
        texts[index] += tokens
    assert all(len(text) == max_new_tokens for text in texts)
    return texts


# --- decoding ----------------------------------------------------------------------------------------------------------------


@all_configs
def test_decoding_equals_full_forward_passes(name):
    """Rows of unequal length, teacher-forced together through the cache, give the logits of each row's own full pass."""
    pure, arrays = models.pure(CONFIGS[name]), models.parameters(CONFIGS[name])
    merged = lambda arrays: pure.merge(arrays["params"], arrays["buffers"])  # noqa: E731
    steps = 6
    rows = [prompt + RNG.integers(0, models.V, steps).tolist() for prompt in PROMPTS]

    @quick_jit
    def full(arrays, tokens_BT):
        model = merged(arrays)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return model.logits(model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)).hidden_BTD)

    longest = max(map(len, rows))
    padded = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
    expected_BTV = np.asarray(full(arrays, padded))  # causal: what stands behind a row changes nothing

    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    tokens_BT = np.full((len(rows), 24), models.V - 1, np.int32)  # padding that would show if anything saw it
    for b, prompt in enumerate(PROMPTS):
        tokens_BT[b, : len(prompt)] = prompt
    first = quick_jit(lambda arrays, *args: prefill(merged(arrays), *args, length=32))
    step = quick_jit(lambda arrays, *args: decode(merged(arrays), *args))
    read = first(arrays, tokens_BT, lengths)
    taken = 1
    for i in range(0, steps, 2):  # two tokens at a time, as with a draft
        for b, length in enumerate(lengths):
            expected_TV = expected_BTV[b, length + i - taken : length + i]
            np.testing.assert_allclose(read.logits_BTV[b], expected_TV, rtol=2e-5, atol=2e-5)
        following = [row[length + i : length + i + 2] for row, length in zip(rows, lengths, strict=True)]
        read, taken = step(arrays, read.cache, np.array(following, np.int32), lengths + i), 2


DRAWN = Sampling(temperature=0.9, top_k=20, top_p=0.9)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        pytest.param("v3", GREEDY, marks=pytest.mark.slow),
        ("v3", DRAWN),
        pytest.param("v2", GREEDY, marks=pytest.mark.slow),
        pytest.param("qwen", DRAWN, marks=pytest.mark.slow),
        ("dense", GREEDY),
    ],
)
def test_the_same_seed_gives_the_same_text_whatever_the_batch(name, sampling):
    seeds = [3, 1, 4, 1]
    together = continued(generator(name), PROMPTS, sampling=sampling, seeds=seeds)
    in_turn = continued(generator(name), PROMPTS, sampling=sampling, seeds=seeds, rows=2)
    backwards = continued(generator(name), PROMPTS[::-1], sampling=sampling, seeds=seeds[::-1])
    alone = [
        continued(generator(name), [prompt], sampling=sampling, seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == in_turn == backwards[::-1] == alone


def test_other_seeds_give_other_text():
    drawn = continued(generator("v3"), [PROMPTS[0]] * 4, sampling=Sampling(temperature=1.0), seeds=[0, 0, 1, 2])
    assert drawn[0] == drawn[1]
    assert len({tuple(row) for row in drawn}) == 3


def test_a_row_that_has_ended_makes_room():
    """Prompts end after unequal numbers of tokens, which the caller decides; no text depends on it."""
    whole = continued(generator("v3"), PROMPTS * 2)
    lengths, texts = [3, 1, 8, 2, 5, 8, 1, 4], [[] for _ in range(8)]
    stream = generator("v3").stream(
        PROMPTS * 2,
        max_new_tokens=8,
        sampling=GREEDY,
        seeds=[0] * 8,
        rows=3,
        ended=lambda index: len(texts[index]) == lengths[index],
    )
    most = 0
    for index, tokens in stream:
        texts[index] += tokens
        most = max(most, sum(0 < len(text) < length for text, length in zip(texts, lengths, strict=True)))
    assert texts == [row[:length] for row, length in zip(whole, lengths, strict=True)] and most <= 3


def test_the_newest_token_counts():
    """A longer continuation begins with the shorter one, and goes on as its tokens would as a prompt."""
    short, long = (continued(generator("v3"), PROMPTS[:2], max_new_tokens=n) for n in (4, 9))
    assert [row[:4] for row in long] == short
    extended = [prompt + row for prompt, row in zip(PROMPTS, short, strict=False)]
    assert continued(generator("v3"), extended, max_new_tokens=5) == [row[4:] for row in long]


MESHES = {
    "rows": MeshConfig(data=8),
    "fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "expert_tensor": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param("v3", "rows", marks=pytest.mark.slow),
        ("v3", "expert_tensor"),
        pytest.param("qwen", "fsdp_tensor", marks=pytest.mark.slow),
        pytest.param("v32_fp8", "expert_tensor", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(name, mesh):
    """Three rows on a mesh that splits them by eight, four or two."""
    sampling, seeds = Sampling(temperature=0.9, top_p=0.9), [5, 6, 7]
    expected = continued(generator(name), PROMPTS[:3], sampling=sampling, seeds=seeds, max_new_tokens=4)
    pure = models.pure(CONFIGS[name])
    built = MESHES[mesh].build()
    with jax.set_mesh(built):
        arrays = jax.tree.map(
            lambda array, leaf: jax.device_put(array, jax.sharding.NamedSharding(built, leaf.sharding.spec)),
            models.parameters(CONFIGS[name]),
            PureModel(pure.config).abstract(),
        )
        split = Generator(pure, arrays)
        assert continued(split, PROMPTS[:3], sampling=sampling, seeds=seeds, max_new_tokens=4) == expected


def test_one_program_serves_many_lengths():
    one = Generator(models.pure(models.V3), models.parameters(models.V3))
    for length in (3, 9, 24):
        continued(one, [PROMPTS[1][:length]], max_new_tokens=8)
    assert one._first._cache_size() == one._following._cache_size() == 1


def test_every_position_can_be_used():
    config = dataclasses.replace(models.V3, max_position_embeddings=28)
    assert len(PROMPTS[1]) + 8 == 28
    [tokens] = continued(Generator(models.pure(config), models.parameters(config)), [PROMPTS[1]])
    assert tokens == continued(generator("v3"), [PROMPTS[1]])[0]


GOLDEN_VARIANTS = [
    pytest.param("deepseek_v3", marks=pytest.mark.slow),
    pytest.param("deepseek_v3_yarn", marks=pytest.mark.slow),
    pytest.param("deepseek_v2_lite", marks=pytest.mark.slow),
    "deepseek_v32",
    pytest.param("glm_moe_dsa", marks=pytest.mark.slow),
    "qwen3_untied",
    pytest.param("qwen3_moe", marks=pytest.mark.slow),
    "llama",
]


@pytest.mark.parametrize("variant", GOLDEN_VARIANTS)
def test_golden_continuations(variant):
    """Greedy decoding with a cache, against code that this project did not write."""
    with np.load(GOLDEN / variant / "golden.npz", allow_pickle=False) as arrays:
        prompts, tokens, expected = arrays["input_ids"], arrays["gen.tokens"], arrays["gen.logits"]
    loaded: LoadedModel = find_model(GOLDEN / variant).load(MeshConfig(data=1).build(jax.devices()[:1]))
    with jax.set_mesh(loaded.mesh):
        generator = Generator(loaded.pure, loaded.arrays)
        assert continued(generator, prompts.tolist(), max_new_tokens=tokens.shape[1]) == tokens.tolist()

    merged = lambda arrays: loaded.pure.merge(arrays["params"], arrays["buffers"])  # noqa: E731
    first = quick_jit(lambda arrays, *args: prefill(merged(arrays), *args, length=64))
    step = quick_jit(lambda arrays, *args: decode(merged(arrays), *args))
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    arrays = jax.tree.map(np.asarray, loaded.arrays)  # off the mesh
    read = first(arrays, prompts, lengths)
    for i in range(tokens.shape[1]):
        np.testing.assert_allclose(read.logits_BTV[:, 0], expected[:, i], rtol=1e-4, atol=1e-4)
        read = step(arrays, read.cache, tokens[:, i : i + 1], lengths + i)


# --- sampling ----------------------------------------------------------------------------------------------------------------


def reference_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities in float64, from the definitions: temperature, the k most likely, the fewest that sum to p."""
    scaled = logits.astype(np.float64) / sampling.temperature
    probability = np.exp(scaled - scaled.max())
    order = np.argsort(-probability)
    if sampling.top_k is not None:
        probability[order[sampling.top_k :]] = 0
    probability /= probability.sum()
    if sampling.top_p is not None:
        kept = int(np.searchsorted(np.cumsum(probability[order]), sampling.top_p)) + 1
        probability[order[kept:]] = 0
    return probability / probability.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.5, top_p=0.7),
        Sampling(temperature=1.3, top_k=5, top_p=0.8),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1.0, top_k=1000, top_p=1.0),
        Sampling(temperature=1e-30),
    ],
    ids=str,
)
def test_samples_follow_the_reference_distribution(sampling):
    draws = 20_000
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32) * 1.5
    seed_B, position_B = np.arange(draws, dtype=np.uint32) % 100, np.arange(draws, dtype=np.int32) // 100
    tokens = sample_tokens(np.broadcast_to(logits, (draws, 1, 12)), seed_B, position_B[:, None], sampling)
    expected = reference_distribution(logits, sampling)
    counts = np.bincount(np.asarray(tokens)[:, 0], minlength=12)
    assert not counts[expected == 0].any()
    drawn = expected > 0
    deviation = np.sqrt(draws * expected[drawn] * (1 - expected[drawn])) + 1e-9
    assert np.all(np.abs(counts[drawn] - draws * expected[drawn]) < 4.5 * deviation)


def test_low_precision_logits_are_sampled_in_float32():
    logits = np.zeros((2000, 1, 8), jnp.bfloat16)
    seed_B, position_BT = np.arange(2000, dtype=np.uint32), np.zeros((2000, 1), np.int32)
    low, high = (
        sample_tokens(logits.astype(dtype), seed_B, position_BT, Sampling(temperature=1.0))
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_array_equal(low, high)


# --- bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_sampling_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 1, "without tokens"),
        ([[1], []], 1, "without tokens"),
        ([[1]], 0, "max_new_tokens=0"),
        ([[1], [1] * 40], 9, "40 tokens.*49 positions.*max_position_embeddings is 48"),
        ([[1, models.V]], 1, f"token id {models.V} "),
        ([[-1]], 1, "token id -1 "),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, max_new_tokens, message):
    config = dataclasses.replace(models.V3, max_position_embeddings=48)
    with pytest.raises(ValueError, match=message):
        check_prompts(config, prompts, max_new_tokens)


def test_buckets_are_few_and_tight():
    lengths = range(1, 5000)
    buckets = [bucket(length) for length in lengths]
    assert all(length <= b <= max(1.25 * length, length + 31) for length, b in zip(lengths, buckets, strict=True))
    assert buckets == sorted(buckets) and buckets[0] == 32
    assert len(set(buckets)) <= 4 * 9
    assert [power_of_two(length) for length in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]
