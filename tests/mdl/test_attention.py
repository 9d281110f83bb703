"""Attention, feed-forward and norm against float64 NumPy; rows are packed here and single documents there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from flax import nnx
from models import FLOAT32, QWEN, V2, V3, V32, V32_FP8, random_tree

from mdl.attention.core import Context
from mdl.attention.dsa import DsaConfig
from mdl.attention.gqa import GqaConfig
from mdl.attention.mla import MlaConfig
from mdl.linear import Init
from mdl.mlp import Mlp
from mdl.norm import LayerNorm, RmsNorm
from mdl.rope import RopeConfig, YarnConfig, rotary_tables
from mdl.transformer import TransformerConfig

D, EPS = 16, 1e-3  # an epsilon large enough to see which norms use it
CASES = {
    "mla": V3.attention,
    "mla_plain_rope": dataclasses.replace(V3.attention, rope=RopeConfig()),
    "mla_no_query_latent": V2.attention,
    "mla_unequal_mscale": dataclasses.replace(V3.attention, rope=YarnConfig(mscale=0.5, mscale_all_dim=1.5)),
    "gqa": QWEN.attention,
    "gqa_no_qk_norm": dataclasses.replace(QWEN.attention, qk_norm=False, rope=RopeConfig()),
    "gqa_one_kv_head": dataclasses.replace(QWEN.attention, num_key_value_heads=1, rope=YarnConfig(factor=4.0)),
    "mha": dataclasses.replace(QWEN.attention, num_key_value_heads=4),
    "dsa": V32.attention,
    "dsa_one_key": dataclasses.replace(V32.attention, index_topk=1),
    "dsa_interleaved_indexer": dataclasses.replace(V32.attention, indexer_rope_interleave=True, index_head_dim=8),
    # With one head every negative product is an exact zero: many equal scores at the boundary.
    "dsa_ties": dataclasses.replace(V32.attention, index_n_heads=1, index_topk=5),
    "dsa_rotated": dataclasses.replace(V32_FP8.attention, index_fp8=False),
    "dsa_fp8": V32_FP8.attention,
    "dsa_window": dataclasses.replace(V32.attention, index_window=2),
    "dsa_over_gqa": DsaConfig(dense=QWEN.attention, index_n_heads=2, index_head_dim=10, index_topk=4),
    "dsa_all_keys": dataclasses.replace(V32.attention, index_topk=10),
}
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1] * 10, [0] * 10], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 0, 0], range(10), [0] * 10], np.int32)


def with_random_parameters(module):
    graph, params = nnx.split(module)
    arrays = random_tree(nnx.to_pure_dict(params))
    nnx.replace_by_pure_dict(params, jax.tree.map(jnp.asarray, arrays))
    return nnx.merge(graph, params), jax.tree.map(lambda a: a.astype(np.float64), arrays)


def init() -> Init:
    return Init(nnx.Rngs(0), 0.1, FLOAT32)


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    config = CASES[name]
    module, params = with_random_parameters(config.build(D, eps=EPS, init=init()))
    x_BTD = np.random.default_rng(0).standard_normal((*SEGMENTS.shape, D)).astype(np.float32)
    tables = rotary_tables(config.rope, config.rotary_dim, jnp.asarray(POSITIONS))
    context = Context(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS), tables)
    got = np.asarray(jax.jit(lambda x: module(x, context)[0])(x_BTD))
    for b, segments in enumerate(SEGMENTS):
        for first, end in numpy_model.documents(segments):
            x = x_BTD[b, first:end].astype(np.float64)
            want = numpy_model.attention(x, params, config, EPS)
            # Float32 with sums of 16 terms, a softmax and two latent norms.
            np.testing.assert_allclose(got[b, first:end], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(got[SEGMENTS == 0], 0)  # padding sees nothing


def test_layer_norm():
    norm, params = with_random_parameters(LayerNorm(D, eps=EPS, init=init()))
    x = np.random.default_rng(1).standard_normal((2, 3, D)).astype(np.float32) * np.float32([[[1e-3], [1], [1e3]]])
    centred = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * params["weight"] + params["bias"]
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, rtol=1e-5, atol=1e-6)


def test_norm():
    """In float32 whatever comes in; the epsilon counts where values are small."""
    norm, params = with_random_parameters(RmsNorm(D, eps=EPS, init=init()))
    x = np.random.default_rng(1).standard_normal((2, 3, D)).astype(np.float32) * np.float32([[[1e-3], [1], [1e3]]])
    want = numpy_model.rms_norm(x.astype(np.float64), params["weight"], EPS)
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, rtol=1e-6)


def test_mlp():
    mlp, params = with_random_parameters(Mlp(D, 24, init=init()))
    x = np.random.default_rng(2).standard_normal((2, 3, D)).astype(np.float32)
    want = numpy_model.mlp(x.astype(np.float64), params)
    np.testing.assert_allclose(mlp(jnp.asarray(x)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GqaConfig(num_attention_heads=4, num_key_value_heads=3), "num_key_value_heads=3"),
        (lambda: GqaConfig(head_dim=7), "head_dim is 7"),
        (lambda: GqaConfig(head_dim=0), "head_dim is 0"),
        (lambda: GqaConfig(num_key_value_heads=0), "num_key_value_heads is 0"),
        (lambda: MlaConfig(num_attention_heads=0), "num_attention_heads is 0"),
        (lambda: MlaConfig(q_lora_rank=0), "q_lora_rank is 0"),
        (lambda: MlaConfig(kv_lora_rank=-1), "kv_lora_rank is -1"),
        (lambda: MlaConfig(qk_rope_head_dim=5), "qk_rope_head_dim is 5"),
        (lambda: DsaConfig(index_topk=0), "index_topk is 0"),
        (lambda: DsaConfig(index_n_heads=0), "index_n_heads is 0"),
        (lambda: DsaConfig(index_topk=8, index_window=8), "index_window=8 must be at least 0 and below index_topk=8"),
        (
            lambda: TransformerConfig(attention=DsaConfig(indexer_types=("full", "shared"))),
            "must say of each of num_hidden_layers=4 layers",
        ),
        (
            lambda: DsaConfig(dense=MlaConfig(q_lora_rank=None)),
            "q_lora_rank is none: the indexer reads the query latent",
        ),
        (lambda: DsaConfig(index_head_dim=24, index_hadamard=True), "index_head_dim=24 must be a power of two"),
        (lambda: DsaConfig(index_head_dim=256, index_fp8=True), "index_head_dim=256 is more than the 128 numbers"),
        (lambda: DsaConfig(index_head_dim=15), "index_head_dim=15 is less than dense.qk_rope_head_dim=16"),
    ],
)
def test_configs_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
