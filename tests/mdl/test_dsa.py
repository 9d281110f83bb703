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
from models import BATCH, FAST_COMPILE, FLOAT32, V32, gradient_of, leaves, parameters, pure, random_tree, result

from experiments.loading import LoadedModel, find_model
from mdl.attention import dsa
from mdl.attention.core import Context
from mdl.attention.dsa import Dsa, DsaConfig, Indexer, select
from mdl.attention.mla import Mla
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
            q_BTIJ = attention.indexer.queries(attention.dense.query_latent(x_BTD), context)
            w_BTI, k_BTJ = attention.indexer.head_weights(x_BTD), attention.indexer.keys(x_BTD, context)
            scores_BTS = attention.indexer.scores(q_BTIJ, w_BTI, k_BTJ)
            found.append((scores_BTS, select(scores_BTS, context.visible(48), model.config.attention.index_topk)))
        return found

    return jax.device_get(quick_jit(run)(jax.device_get(model.arrays), inputs))


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


def scores_without_relu(self: Indexer, q_BTIJ, w_BTI, k_BSJ):
    return jnp.einsum("BTI,BTIJ,BSJ->BTS", w_BTI, q_BTIJ, k_BSJ)


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
    "no relu": (None, lambda m: m.setattr(Indexer, "scores", scores_without_relu)),
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


# ---- choices


def test_select_by_hand():
    inf = np.inf
    scores = np.array([[3.0, 9, 9, 9], [2, 0, 0, 0], [0, 0, 0, 9], [-1, -3, -2, 5], [-inf, 4, -inf, 0]], np.float32)
    visible = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    want = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(select(jnp.asarray(scores)[None], jnp.asarray(visible)[None], 2)[0], want)


@pytest.mark.parametrize("k", [1, 3, 16, 40])
def test_select_takes_k_keys_or_all_that_are_visible(k):
    rng = np.random.default_rng(k)
    scores = np.maximum(rng.standard_normal((2, 16, 16)), 0).astype(np.float32)  # half of them equal
    visible = rng.random((2, 16, 16)) < 0.7
    got = np.asarray(jax.jit(select, static_argnums=2)(scores, visible, k))
    assert not np.any(got & ~visible)
    np.testing.assert_array_equal(got.sum(-1), np.minimum(visible.sum(-1), k))
    lowest_taken = np.where(got, scores, np.inf).min(-1)
    highest_left = np.where(visible & ~got, scores, -np.inf).max(-1)
    assert np.all(lowest_taken >= highest_left)


def test_scores_do_not_depend_on_how_many_queries_are_done_at_once(monkeypatch):
    indexer = with_random_parameters(V32.attention).indexer
    rng = np.random.default_rng(0)
    q, w, k = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 11, 2, 10), (2, 11, 2), (2, 13, 10)))
    whole = indexer.scores(q, w, k)
    monkeypatch.setattr(dsa, "QUERIES_AT_ONCE", 4)
    assert whole.shape == (2, 11, 13)
    np.testing.assert_allclose(indexer.scores(q, w, k), whole, rtol=1e-6, atol=1e-6)


# ---- one layer

D, T = 16, 12


def with_random_parameters(config: DsaConfig, precision: PrecisionConfig = FLOAT32) -> Dsa:
    module = config.build(D, eps=1e-6, init=Init(nnx.Rngs(0), 0.1, precision))
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

    q_BTIJ = module.indexer.queries(module.dense.query_latent(x_BTD), context)
    scores_BTS = module.indexer.scores(q_BTIJ, module.indexer.head_weights(x_BTD), module.indexer.keys(x_BTD, context))
    selected = np.asarray(select(scores_BTS, context.visible(T), 4))[0]
    own = np.eye(T, dtype=bool) & (np.asarray(context.segment_ids_BT)[0] > 0)
    np.testing.assert_array_equal(depends, selected | own)
    np.testing.assert_array_equal(selected.sum(-1), [1, 2, 3, 4, 4, 4, 4, 1, 2, 3, 4, 0])
    assert np.any(depends[4:7] != np.tril(np.ones((T, T), bool))[4:7])


@pytest.mark.parametrize("index_topk", [T, 100])
def test_all_keys_selected_is_the_dense_attention(index_topk):
    module = with_random_parameters(dataclasses.replace(V32.attention, index_topk=index_topk))
    context = packed_context(V32.attention)
    x_BTD = jnp.asarray(np.random.default_rng(4).standard_normal((1, T, D)), jnp.float32)
    got, want = (quick_jit(lambda x, run=run: run(x, context)[0])(x_BTD) for run in (module, module.dense))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_what_is_float32_in_a_bfloat16_model():
    """Head weights, from parameters kept in float32 as published, and scores; the rest in bfloat16."""
    config = V32.attention
    precision = PrecisionConfig(param="bfloat16", compute="bfloat16")
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: with_random_parameters(config, precision))))
    dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert [path for path, dtype in dtypes.items() if dtype != jnp.bfloat16] == ["['indexer']['weights_proj']"]
    assert dtypes["['indexer']['weights_proj']"] == jnp.float32

    @quick_jit
    def run(x_BTD):
        module, context = with_random_parameters(config, precision), packed_context(config)
        q_BTIJ = module.indexer.queries(module.dense.query_latent(x_BTD), context)
        w_BTI, k_BTJ = module.indexer.head_weights(x_BTD), module.indexer.keys(x_BTD, context)
        return module(x_BTD, context)[0], module.indexer.scores(q_BTIJ, w_BTI, k_BTJ), q_BTIJ, w_BTI, k_BTJ

    x_BTD = jnp.asarray(np.random.default_rng(5).standard_normal((1, T, D)), jnp.bfloat16)
    out_BTD, scores_BTS, *parts = run(x_BTD)
    assert [a.dtype for a in (out_BTD, *parts)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bfloat16]
    q, w, k = (np.asarray(a, np.float64) for a in parts)
    want = np.einsum("BTI,BTIS->BTS", w, np.maximum(np.einsum("BTIJ,BSJ->BTIS", q, k) / np.sqrt(10), 0))
    # Nothing is rounded to bfloat16 on the way, which would show at 4e-3.
    np.testing.assert_allclose(scores_BTS, want, rtol=1e-5, atol=1e-5)


# ---- the whole model

SMALL = dataclasses.replace(V32, num_hidden_layers=2, mtp=None)


def test_no_gradient_reaches_an_indexer():
    grads, _ = result(SMALL)
    of_indexer = {path for path in grads if "['indexer']" in path}
    assert len(of_indexer) == 2 * 5  # of the prefix and of the stack
    for path, grad in grads.items():
        assert np.any(grad != 0) == (path not in of_indexer), path


def test_eight_devices_give_what_one_gives():
    want_grads, want_terms = result(SMALL)
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2).build()
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s.sharding.spec), pure(SMALL).abstract())
        tree = jax.device_put(parameters(SMALL), shardings)
        batch = jax.device_put(BATCH, NamedSharding(mesh, spec(None, "batch", None)))
        grads, terms = gradient_of(SMALL)(tree["params"], tree["buffers"], batch, 0.5, 0.7)
    np.testing.assert_allclose(terms.loss, want_terms.loss, rtol=ROUNDING)
    for path, grad in leaves(grads).items():
        atol = ROUNDING * np.abs(want_grads[path]).max()
        np.testing.assert_allclose(grad, want_grads[path], rtol=0, atol=atol, err_msg=path)
    for grad, sharding in zip(jax.tree.leaves(grads), jax.tree.leaves(shardings["params"]), strict=True):
        assert grad.sharding.is_equivalent_to(sharding, grad.ndim)
