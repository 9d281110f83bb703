"""Sparse attention against golden scores and choices, every mistake that would show, and what must hold whatever the numbers are.

Values and gradients against float64 NumPy: test_attention.py, test_transformer_reference.py. Logits, layers, loss, gradients and
decoding against golden files: test_goldens.py, test_generate.py.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from models import (
    BATCH,
    FAST_COMPILE,
    FLOAT32,
    QWEN,
    V32,
    V32_FP8,
    gradient_of,
    leaves,
    parameters,
    pure,
    random_tree,
    result,
)
from numpy_model import index_scores, indexer_terms, selected

from experiments.loading import LoadedModel, find_model
from mdl.attention import dsa, selection
from mdl.attention.core import Context
from mdl.attention.dsa import Dsa, DsaConfig, Indexer
from mdl.attention.mla import Mla
from mdl.attention.selection import Index, select
from mdl.linear import Init
from mdl.norm import LayerNorm
from mdl.precision import PrecisionConfig
from mdl.rope import apply_rotary, rotary_tables
from mdl.sharding import MeshConfig, spec

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "deepseek_v32"
TOLERANCE = 1e-4  # see tests/golden/README.md
ROUNDING = 1e-5  # two float32 orders of the same sums, through a few layers

quick_jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@functools.cache
def loaded() -> LoadedModel:
    return find_model(GOLDEN).load(MeshConfig(data=1).build(jax.devices()[:1]))


# ---- against code that this project did not write


def scores_of(index: Index) -> np.ndarray:
    """[B, T, S] of all keys, visible or not; eq. 1 in float64."""
    q, w, k = (np.asarray(a, np.float64) for a in index[:3])
    return np.einsum("BTI,BTIS->BTS", w, np.maximum(np.einsum("BTIJ,BSJ->BTIS", q, k), 0))


def is_selected(index_BTW: jax.Array, num_keys: int) -> np.ndarray:
    """Bool [B, T, S]"""
    return np.any(np.asarray(index_BTW)[..., None] == np.arange(num_keys), axis=2)


@functools.cache
def scores_and_choices() -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every layer, each from the golden output of the layer before."""
    model, want = loaded(), golden()
    inputs = [want["embed_out"], *want["layer_out"][:-1]]

    def run(arrays, x_LBTD):
        transformer = model.pure.merge(arrays["params"], arrays["buffers"])
        positions_BT = jnp.broadcast_to(jnp.arange(48, dtype=jnp.int32), (2, 48))
        context = transformer.context(positions_BT, jnp.ones((2, 48), jnp.int32))
        graph, stack = nnx.split(transformer.stack)
        blocks = [
            transformer.prefix["0"],
            *(nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stack)) for i in (0, 1)),
        ]
        found = []
        for block, x_BTD in zip(blocks, x_LBTD, strict=True):
            x_BTD, attention = block.attention_norm(x_BTD), block.attention
            entries = attention.indexer.entries(x_BTD, context)
            index = attention.indexer(x_BTD, attention.dense.query_latent(x_BTD), entries, context)
            found.append((index, select(index, context.mask(48), model.config.attention.index_topk)))
        return found

    found = quick_jit(run)(jax.device_get(model.arrays), inputs)
    return [(scores_of(index), is_selected(index_BTW, 48)) for index, index_BTW in found]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_scores_and_selected_keys(layer):
    scores_BTS, selected_BTS = scores_and_choices()[layer]
    want = golden()[f"indexer.{layer}.scores"]
    seen = np.isfinite(want)
    np.testing.assert_allclose(scores_BTS[seen], want[seen], rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(selected_BTS, golden()[f"indexer.{layer}.selected"])


# The mistakes that others have made here. `replaced` is a change of the config, `patch` one of the code.


def rotary_last(self: Indexer, x_BTIJ, context):
    rest, x_BTIR = jnp.split(x_BTIJ, [x_BTIJ.shape[-1] - self.config.rotary_dim], axis=-1)
    x_BTIR = apply_rotary(x_BTIR, context.rotary, interleaved=self.config.indexer_rope_interleave)
    return jnp.concatenate([rest, x_BTIR], axis=-1)


def root_mean_square(self: LayerNorm, x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps) * self.weight[...]


def without_bias(self: LayerNorm, x):
    return (x - jnp.mean(x, axis=-1, keepdims=True)) / jnp.std(x, axis=-1, keepdims=True) * self.weight[...]


def select_without_relu(index: Index, mask, topk, *, fp8):
    assert not fp8
    scores_BTS = jnp.einsum("BTI,BTIJ,BSJ->BTS", index.w_BTI, index.q_BTIJ, index.k_BSJ)
    visible_BTS = mask.array(*scores_BTS.shape)
    best_BTW, index_BTW = jax.lax.top_k(jnp.where(visible_BTS, scores_BTS, -jnp.inf), topk)
    return jnp.where(best_BTW == -jnp.inf, scores_BTS.shape[-1], index_BTW)


def latent_before_its_norm(monkeypatch):
    """For the indexer only: the queries of the attention itself norm it later."""
    queries = Mla.queries
    monkeypatch.setattr(Mla, "query_latent", lambda self, x_BTD: self.q_a_proj(x_BTD))
    monkeypatch.setattr(
        Mla, "queries", lambda self, latent_BTQ, context: queries(self, self.q_a_norm(latent_BTQ), context)
    )


def positive_weights(monkeypatch):
    weights = Indexer.head_weights
    monkeypatch.setattr(Indexer, "head_weights", lambda self, x_BTD: jnp.abs(weights(self, x_BTD)))


def main_rope_half_split(c: DsaConfig) -> DsaConfig:
    return dataclasses.replace(c, dense=dataclasses.replace(c.dense, rope_interleave=False))


MISTAKES = {
    "indexer RoPE interleaved": (lambda c: dataclasses.replace(c, indexer_rope_interleave=True), None),
    "indexer RoPE on the last channels": (None, lambda m: m.setattr(Indexer, "_rotated", rotary_last)),
    "main RoPE half-split": (main_rope_half_split, None),
    "no selection": (lambda c: dataclasses.replace(c, index_topk=48), None),
    "one key too many": (lambda c: dataclasses.replace(c, index_topk=13), None),
    "key norm RMS": (None, lambda m: m.setattr(LayerNorm, "__call__", root_mean_square)),
    "key norm without bias": (None, lambda m: m.setattr(LayerNorm, "__call__", without_bias)),
    "no relu": (None, lambda m: m.setattr(dsa, "select", select_without_relu)),
    "latent before its norm": (None, latent_before_its_norm),
    "weights of one sign": (None, positive_weights),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_shows(name, monkeypatch):
    """In the output of one layer, which the tests of the golden files compare too."""
    replaced, patch = MISTAKES[name]
    config = loaded().config.attention
    if patch:
        patch(monkeypatch)
    difference = first_layer(replaced(config) if replaced else config) - golden()["attn_out"][0]
    assert np.abs(difference).max() > 1000 * TOLERANCE


def first_layer(config: DsaConfig) -> np.ndarray:
    """The attention of the first layer, computed as `config` says."""
    params = jax.device_get(loaded().arrays["params"]["prefix"]["0"])
    positions_BT = jnp.broadcast_to(jnp.arange(48, dtype=jnp.int32), (2, 48))
    tables = rotary_tables(config.rope, config.rotary_dim, positions_BT)
    context = Context(positions_BT, jnp.ones((2, 48), jnp.int32), tables)

    @quick_jit
    def run(x_BTD):
        module = with_parameters(config.build(64, eps=1e-6, init=Init(nnx.Rngs(0), 0.1, FLOAT32)), params["attention"])
        normed_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + 1e-6)
        return module(normed_BTD * params["attention_norm"]["weight"], context)[0]

    return np.asarray(run(golden()["embed_out"]))


def test_without_a_mistake_nothing_shows():
    np.testing.assert_allclose(
        first_layer(loaded().config.attention), golden()["attn_out"][0], rtol=TOLERANCE, atol=TOLERANCE
    )


# ---- one layer

D, T, EPS = 16, 12, 1e-6


def with_random_parameters(config: DsaConfig, precision: PrecisionConfig = FLOAT32) -> Dsa:
    module = config.build(D, eps=EPS, init=Init(nnx.Rngs(0), 0.1, precision))
    return with_parameters(module, random_tree(nnx.to_pure_dict(nnx.state(module))))


def with_parameters(module: Dsa, arrays) -> Dsa:
    graph, params = nnx.split(module)
    nnx.replace_by_pure_dict(
        params, jax.tree.map(lambda p, a: jnp.asarray(a, p.dtype), nnx.to_pure_dict(params), arrays)
    )
    return nnx.merge(graph, params)


def packed_context(config: DsaConfig) -> Context:
    """Documents of 7 and 4 tokens, and one of padding."""
    positions_BT = jnp.asarray([[*range(7), *range(4), 0]], jnp.int32)
    segment_ids_BT = jnp.asarray([[1] * 7 + [2] * 4 + [0]], jnp.int32)
    return Context(positions_BT, segment_ids_BT, rotary_tables(config.rope, config.rotary_dim, positions_BT))


def test_an_output_depends_on_its_own_token_and_the_selected_ones_only():
    """So nothing later and nothing of another document; the first four of a document see all that came before."""
    module, context = with_random_parameters(V32.attention), packed_context(V32.attention)
    x_BTD = jnp.asarray(np.random.default_rng(3).standard_normal((1, T, D)), jnp.float32)
    jacobian_TDTD = quick_jit(jax.jacrev(lambda x_TD: module(x_TD[None], context)[0][0]))(x_BTD[0])
    depends = np.abs(jacobian_TDTD).max(axis=(1, 3)) > 0

    entries = module.indexer.entries(x_BTD, context)
    index = module.indexer(x_BTD, module.dense.query_latent(x_BTD), entries, context)
    chosen = is_selected(select(index, context.mask(T), 4), T)[0]
    own = np.eye(T, dtype=bool) & (np.asarray(context.segment_ids_BT)[0] > 0)
    np.testing.assert_array_equal(depends, chosen | own)
    np.testing.assert_array_equal(chosen.sum(-1), [1, 2, 3, 4, 4, 4, 4, 1, 2, 3, 4, 0])
    for first, end in ((0, 7), (7, 11)):  # by their scores, document by document
        want = selected(scores_of(index)[0, first:end, first:end], 4)
        assert [(np.flatnonzero(row) - first).tolist() for row in chosen[first:end]] == [sorted(row) for row in want]
    assert np.any(depends[4:7] != np.tril(np.ones((T, T), bool))[4:7])


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize(
    ("attention", "index_topk", "index_window"),
    [
        (V32.attention, 1, 0),
        (V32.attention, 4, 0),
        (V32.attention, 4, 2),
        (V32.attention, 100, 0),
        (V32_FP8.attention, 4, 0),
        (DsaConfig(dense=QWEN.attention, index_n_heads=2, index_head_dim=10), 4, 0),
    ],
    ids=["one", "some", "window", "all", "fp8", "gqa"],
)
def test_what_an_indexer_reports_and_learns_from(attention, index_topk, index_window, warmup):
    """Values, and the gradient by central differences, against float64 NumPy; padding counts for nothing."""
    config = dataclasses.replace(attention, index_topk=index_topk, index_window=index_window, warmup=warmup)
    module, context = with_random_parameters(config), packed_context(config)
    context = dataclasses.replace(context, measure="recall")
    graph, variables = nnx.split(module)
    params = nnx.to_pure_dict(variables)
    x_TD = np.random.default_rng(6).standard_normal((T, D)).astype(np.float32)

    def stats(params):
        filled = jax.tree.map(lambda leaf: leaf, variables)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)(jnp.asarray(x_TD[None]), context).indexer

    def expected(params):
        return np.sum(
            [
                indexer_terms(x_TD[first:end].astype(np.float64), params, config, EPS)
                for first, end in ((0, 7), (7, 11))
            ],
            axis=0,
        )

    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    np.testing.assert_allclose(jnp.stack(quick_jit(stats)(params)), expected(wide), rtol=ROUNDING, atol=ROUNDING)
    if index_topk == 1 and not warmup:
        return  # one key has all of the attention and all of the indexer's, whatever it has learnt

    grads = leaves(quick_jit(jax.grad(lambda params: stats(params).kl))(params))
    rng = np.random.default_rng(7)
    for path in (path for path in grads if "['indexer']" in path):
        direction = rng.standard_normal(grads[path].shape)

        def moved(step, path=path, direction=direction):
            return expected(
                jax.tree_util.tree_map_with_path(
                    lambda p, leaf: leaf + step * direction if jax.tree_util.keystr(p) == path else leaf, wide
                )
            )[0]

        want = (moved(1e-6) - moved(-1e-6)) / 2e-6
        np.testing.assert_allclose(
            np.sum(grads[path] * direction), want, rtol=1e-4, atol=1e-4 * np.linalg.norm(grads[path]), err_msg=path
        )


@pytest.mark.parametrize("index_topk", [T, 100])
def test_all_keys_selected_is_the_dense_attention(index_topk):
    module = with_random_parameters(dataclasses.replace(V32.attention, index_topk=index_topk))
    context = packed_context(V32.attention)
    x_BTD = jnp.asarray(np.random.default_rng(4).standard_normal((1, T, D)), jnp.float32)
    got, want = (quick_jit(lambda x, run=run: run(x, context)[0])(x_BTD) for run in (module, module.dense))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_what_is_float32_in_a_bfloat16_model():
    """Head weights, from parameters kept in float32 as published; the rest in bfloat16."""
    config = V32.attention
    precision = PrecisionConfig(param="bfloat16", compute="bfloat16")
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: with_random_parameters(config, precision))))
    dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert [path for path, dtype in dtypes.items() if dtype != jnp.bfloat16] == ["['indexer']['weights_proj']"]
    assert dtypes["['indexer']['weights_proj']"] == jnp.float32

    @quick_jit
    def run(x_BTD):
        module, context = with_random_parameters(config, precision), packed_context(config)
        latent_BTQ, entries = module.dense.query_latent(x_BTD), module.indexer.entries(x_BTD, context)
        return module(x_BTD, context)[0], module.indexer(x_BTD, latent_BTQ, entries, context)

    x_BTD = jnp.asarray(np.random.default_rng(5).standard_normal((1, T, D)), jnp.bfloat16)
    out_BTD, index = run(x_BTD)
    assert [a.dtype for a in (out_BTD, *index[:3])] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bfloat16]


# ---- as the published inference code scores

ROTATED = DsaConfig(dense=V32.attention.dense, index_n_heads=4, index_head_dim=64, index_topk=16, index_hadamard=True)


def scored(config: DsaConfig, tokens: int = 96):
    """(parameters, x [T, D], index, choice [T, T]) of a document."""
    module = with_random_parameters(config)
    positions_BT = jnp.arange(tokens, dtype=jnp.int32)[None]
    context = Context(
        positions_BT, jnp.ones_like(positions_BT), rotary_tables(config.rope, config.rotary_dim, positions_BT)
    )
    x_BTD = jnp.asarray(np.random.default_rng(8).standard_normal((1, tokens, D)), jnp.float32)

    @quick_jit
    def run(x_BTD):
        index = module.indexer(x_BTD, module.dense.query_latent(x_BTD), module.indexer.entries(x_BTD, context), context)
        return index, select(index, context.mask(tokens), config.index_topk, fp8=config.index_fp8)

    index, index_BTW = run(x_BTD)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(module)))
    return params, np.asarray(x_BTD[0], np.float64), index, is_selected(index_BTW, tokens)[0]


def test_rotation_alone_changes_no_score():
    plain, rotated = (scored(dataclasses.replace(ROTATED, index_hadamard=on))[2] for on in (False, True))
    assert np.abs(plain.k_BSJ - rotated.k_BSJ).max() > 1
    want = scores_of(plain)
    np.testing.assert_allclose(scores_of(rotated), want, rtol=0, atol=ROUNDING * np.abs(want).max())


@pytest.mark.parametrize("hadamard", [False, True])
def test_fp8_chooses_nearly_the_same_keys(hadamard):
    """Those of the NumPy model of the published code, nineteen of twenty of which exact scores choose too."""
    config = dataclasses.replace(ROTATED, index_hadamard=hadamard, index_fp8=True)
    params, x_TD, _, got_TS = scored(config)
    k, tokens = config.index_topk, len(x_TD)
    exact_TS, want_TS = np.zeros((2, tokens, tokens), bool)
    for choice_TS, fp8 in ((exact_TS, False), (want_TS, True)):
        for t, keys in enumerate(selected(index_scores(x_TD, params, config, fp8=fp8), k)):
            choice_TS[t, keys] = True
    # Of the 30,000 numbers that are rounded, one that lies on the boundary between two may fall to the other side in float32.
    assert np.sum(got_TS != want_TS) <= 2
    crowded = slice(2 * k, None)  # queries that see twice as many keys as they choose
    shared = np.sum((got_TS & exact_TS)[crowded]) / np.sum(exact_TS[crowded])
    assert 0.95 < shared < 1


# ---- the whole model

SMALL = dataclasses.replace(V32, num_hidden_layers=2)
LAYERS = 3  # with the MTP module's
STAGES = {
    "warmup": dataclasses.replace(SMALL, attention=dataclasses.replace(V32.attention, warmup=True)),
    "sparse": SMALL,
}


@pytest.mark.parametrize("stage", STAGES)
def test_each_loss_reaches_its_own_parameters_only(stage):
    """The text's no indexer, and the indexers' nothing else: there the gradient is the same, bit for bit, with and without it."""
    without, terms = result(STAGES[stage])
    grads, with_loss = result(STAGES[stage], indexer=2.0)
    of_indexers = {path for path in grads if "['indexer']" in path}
    assert len(of_indexers) == 5 * LAYERS  # of the prefix, the stack and the MTP module
    for path, grad in grads.items():
        if path in of_indexers:
            assert np.any(grad != 0) and not np.any(without[path] != 0), path
        else:
            np.testing.assert_array_equal(grad, without[path], err_msg=path)
            assert np.any(grad != 0), path
    assert terms.indexer is None
    assert with_loss.indexer.kl.shape == (LAYERS,) and np.all(with_loss.indexer.kl > 0)
    np.testing.assert_allclose(with_loss.loss, terms.loss + 2 * with_loss.indexer.kl.sum(), rtol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_parts_of_a_row_are_the_whole(stage, monkeypatch):
    """5 of 12 queries at a time, the last part smaller: the same losses and gradients."""
    want_grads, want = result(STAGES[stage], indexer=2.0)
    monkeypatch.setattr(dsa, "QUERIES", 5)
    gradient_of.cache_clear()
    grads, got = result(STAGES[stage], indexer=2.0)
    gradient_of.cache_clear()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=ROUNDING)
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, want_grads[path], rtol=0, atol=ROUNDING * np.abs(want_grads[path]).max())


@pytest.mark.parametrize(
    ("stage", "masked_keys"),
    [
        pytest.param("sparse", 0, id="gathered"),
        pytest.param("sparse", 1000, id="by mask", marks=pytest.mark.slow),
        pytest.param("warmup", 0, id="warmup", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_what_one_gives(stage, masked_keys, monkeypatch):
    config = STAGES[stage]
    want_grads, want_terms = result(config, indexer=2.0)
    monkeypatch.setattr(selection, "MASKED_KEYS", masked_keys)
    gradient_of.cache_clear()  # of what was traced with another rule
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2).build()
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s.sharding.spec), pure(config).abstract())
        tree = jax.device_put(parameters(config), shardings)
        batch = jax.device_put(BATCH, NamedSharding(mesh, spec(None, "batch", None)))
        grads, terms = gradient_of(config, 2.0)(tree["params"], tree["buffers"], batch, 0.5, 0.7)
    np.testing.assert_allclose(terms.loss, want_terms.loss, rtol=ROUNDING)
    np.testing.assert_allclose(terms.indexer.kl, want_terms.indexer.kl, rtol=ROUNDING)
    for path, grad in leaves(grads).items():
        atol = ROUNDING * np.abs(want_grads[path]).max()
        np.testing.assert_allclose(grad, want_grads[path], rtol=0, atol=atol, err_msg=path)
    for grad, sharding in zip(jax.tree.leaves(grads), jax.tree.leaves(shardings["params"]), strict=True):
        assert grad.sharding.is_equivalent_to(sharding, grad.ndim)
