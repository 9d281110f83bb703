"""Absorbed attention over a cache of latents against the expanded one, and caches written in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx

from mdl.attention.cache import write
from mdl.attention.core import Context
from mdl.attention.mla import Mla, MlaConfig
from mdl.generate import Generator
from mdl.linear import Init
from mdl.precision import PrecisionConfig
from mdl.rope import YarnConfig, rotary_tables
from mdl.sampling import Sampling
from mdl.sharding import MeshConfig

D, B, S = 32, 8, 24
CONFIGS = {
    "v3": models.V3.attention,  # with YaRN's mscale in the softmax scale
    "v2": models.V2.attention,  # no query latent, half-split rotary pairs
    "unequal mscale": dataclasses.replace(models.V3.attention, rope=YarnConfig(mscale=0.5, mscale_all_dim=1.5)),
    "wide values": dataclasses.replace(models.V3.attention, v_head_dim=14, qk_nope_head_dim=3, num_attention_heads=4),
}
STARTS = np.array([0, 1, 5, 9, 20, 3, 0, 17], np.int32)  # where each row's next tokens stand


def attention(config: MlaConfig, precision: PrecisionConfig) -> Mla:
    module = config.build(D, eps=1e-6, init=Init(nnx.Rngs(0), 0.3, precision))
    graph, params = nnx.split(module)
    nnx.replace_by_pure_dict(params, jax.tree.map(jnp.asarray, models.random_tree(nnx.to_pure_dict(params))))
    return nnx.merge(graph, params)


def both(config: MlaConfig, precision: PrecisionConfig, T: int) -> tuple[np.ndarray, np.ndarray]:
    """o_BTNU of T tokens on a cache of random entries, absorbed and expanded."""
    module, rng = attention(config, precision), np.random.default_rng(1)
    positions_BT = jnp.asarray(STARTS[:, None] + np.arange(T, dtype=np.int32))
    context = Context(positions_BT, None, rotary_tables(config.rope, config.rotary_dim, positions_BT))
    x_BTD = jnp.asarray(rng.standard_normal((B, T, D)), precision.compute_dtype)
    cache = jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), module.empty_cache(B, S, precision.compute_dtype)
    )

    @jax.jit
    def run(x_BTD, cache):
        q_BTNK = module.queries(module.query_latent(x_BTD), context)
        cache = write(cache, module.entries(x_BTD, context), context.positions_BT)
        return module.attend_absorbed(q_BTNK, cache, context), module.attend_expanded(q_BTNK, cache, context)

    absorbed, expanded = run(x_BTD, cache)
    assert absorbed.dtype == expanded.dtype == precision.compute_dtype
    return np.asarray(absorbed, np.float64), np.asarray(expanded, np.float64)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_equals_expanded(name, T):
    """The same sums in another order."""
    absorbed, expanded = both(CONFIGS[name], models.FLOAT32, T)
    np.testing.assert_allclose(absorbed, expanded, rtol=1e-5, atol=1e-5 * np.abs(expanded).max())


def test_absorbed_in_bfloat16_is_as_good_as_expanded():
    """Each rounds other things (q k_up there, the keys and values here): neither may be twice as far from float32 as the other."""
    exact, _ = both(CONFIGS["v3"], models.FLOAT32, 1)
    absorbed, expanded = both(CONFIGS["v3"], PrecisionConfig(), 1)
    errors = [np.sqrt(np.mean((o - exact) ** 2)) for o in (absorbed, expanded)]
    assert 1e-4 < errors[0] <= 2 * errors[1]
    assert errors[1] < 0.05 * np.sqrt(np.mean(exact**2))


def test_the_rule():
    """Few queries absorb and a prompt that fills its cache expands, at V3's widths as at those of a small model."""
    v3 = MlaConfig(num_attention_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    for slots in (32, 4096, 131072):
        assert all(v3.absorbs(T, slots) for T in (1, 2, 4))
        assert not v3.absorbs(slots, slots)
    assert v3.absorbs(160, 10**6) and not v3.absorbs(180, 10**6)
    assert MlaConfig().absorbs(1, 32) and not MlaConfig().absorbs(64, 64)


def test_the_cache_holds_the_latent_and_the_shared_key_only():
    cache = attention(models.V3.attention, models.FLOAT32).empty_cache(1, S, jnp.dtype(jnp.bfloat16))
    assert sum(a.nbytes for a in cache.values()) == S * models.V3.attention.cache_bytes(2)
    assert MlaConfig(kv_lora_rank=512, qk_rope_head_dim=64).cache_bytes(2) == 2 * 576


PROMPTS = [np.random.default_rng(5).integers(0, models.V, n).tolist() for n in (9, 2, 17, 5)]


def continued(generator: Generator) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in PROMPTS]
    for index, tokens in generator.stream(PROMPTS, max_new_tokens=6, sampling=Sampling(), seeds=[0] * len(PROMPTS)):
        texts[index] += tokens
    return texts


@functools.cache
def expected(name: str) -> list[list[int]]:
    """Greedy tokens with every step expanded."""
    config = models.CONFIGS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlaConfig, "absorbs", lambda self, num_queries, num_slots: False)
        return continued(Generator(models.pure(config), models.parameters(config), layers_apart=False))


@pytest.mark.parametrize("layers_apart", [True, False])
@pytest.mark.parametrize("name", ["v3", "v2"])
def test_generation_is_the_same(name, layers_apart):
    config = models.CONFIGS[name]
    generator = Generator(models.pure(config), models.parameters(config), layers_apart=layers_apart)
    assert continued(generator) == expected(name)


@pytest.mark.parametrize(
    ("mesh", "layers_apart"),
    [(MeshConfig(data=2, fsdp=2, tensor=2), True), (MeshConfig(data=1, fsdp=4, tensor=2), False)],
    ids=str,
)
def test_generation_on_eight_devices(mesh, layers_apart):
    """Heads over `tensor`, rows over the others."""
    config, built = models.V3, mesh.build()
    with jax.set_mesh(built):
        arrays = jax.tree.map(
            lambda array, leaf: jax.device_put(array, jax.sharding.NamedSharding(built, leaf.sharding.spec)),
            models.parameters(config),
            models.PureModel(config).abstract(),
        )
        assert continued(Generator(models.pure(config), arrays, layers_apart=layers_apart)) == expected("v3")


# --- writing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 3])
def test_rows_are_written_at_their_own_positions(T):
    rng = np.random.default_rng(2)
    cache = {"a": rng.standard_normal((B, S, 5)).astype(np.float32), "b": rng.standard_normal((B, S, 2, 3))}
    new = {"a": rng.standard_normal((B, T, 5)).astype(np.float32), "b": rng.standard_normal((B, T, 2, 3))}
    cache, new = ({name: a.astype(np.float32) for name, a in tree.items()} for tree in (cache, new))
    start = np.minimum(STARTS, S - T)
    got = jax.jit(write)(cache, new, start[:, None] + np.arange(T))
    for name, a in cache.items():
        want = a.copy()
        for b in range(B):
            want[b, start[b] : start[b] + T] = new[name][b]
        np.testing.assert_array_equal(got[name], want)


def test_what_has_no_slot_overwrites_nothing():
    cache, new = {"a": jnp.zeros((2, 4, 3))}, {"a": jnp.ones((2, 2, 3))}
    got = np.asarray(write(cache, new, jnp.array([[3, 4], [2, 3]]))["a"])
    assert not got[0].any() and got[1, 2:].all() and not got[1, :2].any()


def test_more_tokens_than_slots_are_refused():
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4 positions"):
        write({"a": jnp.zeros((1, 4, 3))}, {"a": jnp.zeros((1, 5, 3))}, jnp.zeros((1, 5), jnp.int32))
