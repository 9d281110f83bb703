"""Counts against hand arithmetic and published numbers, without an array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FLOAT32, QWEN

from configs import deepseek_v2_lite, deepseek_v3, deepseek_v32
from mdl.attention.dsa import DsaConfig
from mdl.attention.gqa import GqaConfig
from mdl.attention.mla import MlaConfig
from mdl.flops import cache_bytes_per_token, count_parameters, forward_flops_per_token, train_flops_per_token
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.mtp import MtpConfig
from mdl.pure import PureModel
from mdl.transformer import TransformerConfig

V3 = deepseek_v3.get_config().model
TEN_MILLION = TransformerConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    attention=MlaConfig(
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    mlp=MlpConfig(intermediate_size=704),
    moe=MoeConfig(moe_intermediate_size=176, router=RouterConfig(n_routed_experts=16, num_experts_per_tok=4)),
)


def hand(D, V, L, k_dense, N, Q, C, H, R, U, F, f, E, X, shared):
    """Parameters of (embedding and head, one attention, dense feed-forward, one expert, rest of an MoE layer)."""
    attention = D * Q + Q + Q * N * (H + R) + D * (C + R) + C + C * N * (H + U) + N * U * D
    return {
        "ends": 2 * V * D + D,  # the final norm included
        "attention": attention + 2 * D,  # both layer norms included
        "dense": 3 * D * F,
        "expert": 3 * D * f,
        "around": 3 * D * f * shared + D * E,  # shared experts and router
    }


V3_HAND = hand(7168, 129280, 61, 3, 128, 1536, 512, 128, 64, 128, 18432, 2048, 256, 8, 1)
TEN_HAND = hand(256, 4096, 4, 1, 4, 96, 64, 32, 16, 32, 704, 176, 16, 4, 1)


def test_deepseek_v3():
    """671.0B in total and 37.x B active: embedding and head counted, MTP and router biases not."""
    h = V3_HAND
    count = count_parameters(V3)
    layers = 61 * h["attention"] + 3 * h["dense"] + 58 * h["around"]
    assert count.total == h["ends"] + layers + 58 * 256 * h["expert"] == 671_026_404_352
    assert count.active == h["ends"] + layers + 58 * 8 * h["expert"]
    assert 37.0e9 < count.active < 38.0e9
    # The report's 14B more on disk are this module, with embedding and head once more.
    assert count.mtp == 2 * 7168 * 7168 + 3 * 7168 + h["attention"] + h["around"] + 256 * h["expert"]


def test_deepseek_v32():
    """V3 and in every layer an indexer of 14.0M parameters."""
    count, v3 = count_parameters(deepseek_v32.get_config().model), count_parameters(V3)
    indexer = 1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64
    assert count.total - v3.total == count.active - v3.active == 61 * indexer
    assert count.mtp - v3.mtp == indexer


def test_ten_million():
    count = count_parameters(TEN_MILLION)
    assert count.total == 9_997_184
    assert count.active == 5_131_136
    assert count.active - 4096 * 256 == 4_082_560  # without the embedding, which multiplies nothing
    assert count.mtp == 0


def test_deepseek_v2_lite():
    """15.7B in total, 2.7B active by the published card, which says 2.4B without embedding and head."""
    count = count_parameters(deepseek_v2_lite.get_config().model)
    assert round(count.total / 1e8) == 157
    assert round(count.active / 1e8) == 27


def test_tied_embeddings_count_once():
    untied = count_parameters(dataclasses.replace(QWEN, tie_word_embeddings=False))
    assert untied.total - count_parameters(QWEN).total == QWEN.vocab_size * QWEN.hidden_size


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_flops_per_token_by_hand(depth):
    mtp = MtpConfig(num_nextn_predict_layers=depth) if depth else None
    config, h, seq_len = dataclasses.replace(TEN_MILLION, mtp=mtp), TEN_HAND, 128
    norms = 2 * 256 + 96 + 64
    moe = h["attention"] - norms + h["around"] + 4 * h["expert"]
    head = 4096 * 256
    matrices = head + h["attention"] - norms + h["dense"] + 3 * moe + depth * (2 * 256 * 256 + moe + head)
    scores = (4 + depth) * 4 * (2 * (32 + 16) + 2 * 32) * (seq_len + 1) / 2
    assert forward_flops_per_token(config, seq_len) == pytest.approx(2 * matrices + scores, rel=1e-12)
    assert train_flops_per_token(config, seq_len) == 3 * forward_flops_per_token(config, seq_len)
    if depth:
        without = dataclasses.replace(config, mtp=None)
        assert forward_flops_per_token(config, seq_len, mtp=False) == forward_flops_per_token(without, seq_len)


def test_flops_of_sparse_attention_by_hand():
    """Every key that a query sees is scored by every indexer head, and at most index_topk are attended to."""
    I, J, k, T = 4, 32, 5, 12
    dense = TEN_MILLION.attention
    sparse = DsaConfig(dense=dense, index_n_heads=I, index_head_dim=J, index_topk=k)
    matrices = 96 * I * J + 256 * J + 256 * I
    per_layer = 2 * matrices
    for t in range(T):
        seen, attended = t + 1, min(t + 1, k)
        per_layer += 2 * I * (J + 1) * seen / T
        per_layer -= 2 * 4 * (32 + 16 + 32) * (seen - attended) / T
    got = forward_flops_per_token(dataclasses.replace(TEN_MILLION, attention=sparse), T)
    assert got == pytest.approx(forward_flops_per_token(TEN_MILLION, T) + 4 * per_layer, rel=1e-12)


def test_flops_of_the_stages_of_sparse_training_by_hand():
    """Both stages: forward, and of the indexers, whose input gets no gradient, those of their matrices and scores; the loss is of
    all keys that are seen in the first, of those attended to in the second. The rest is frozen in the first."""
    I, J, k, T = 4, 32, 5, 12
    attention = DsaConfig(dense=TEN_MILLION.attention, index_n_heads=I, index_head_dim=J, index_topk=k)
    seen, attended = ([min(t + 1, most) for t in range(T)] for most in (T, k))
    matrices, score = 2 * (96 * I * J + 256 * J + 256 * I), 2 * I * (J + 1)
    rest = forward_flops_per_token(TEN_MILLION, T)

    warmup = dataclasses.replace(TEN_MILLION, attention=dataclasses.replace(attention, warmup=True))
    got = train_flops_per_token(warmup, T, lambda path: "/indexer/" in path)
    assert got == pytest.approx(rest + 4 * (2 * matrices + 3 * score * sum(seen) / T), rel=1e-12)

    sparse = dataclasses.replace(TEN_MILLION, attention=attention)
    rest -= 4 * 2 * 4 * (32 + 16 + 32) * (sum(seen) - sum(attended)) / T
    indexers = 4 * (2 * matrices + score * (sum(seen) + 2 * sum(attended)) / T)
    assert train_flops_per_token(sparse, T) == pytest.approx(3 * rest + indexers, rel=1e-12)
    without = train_flops_per_token(sparse, T, lambda path: "/indexer/" not in path)
    assert without == pytest.approx(3 * rest + 4 * (matrices + score * sum(seen) / T), rel=1e-12)
    assert train_flops_per_token(sparse, T, lambda path: False) == forward_flops_per_token(sparse, T)


def test_flops_of_what_is_not_frozen_by_hand():
    """Gradients pass through what lies behind the first trained part, and no other; a depth of MTP has a head of its own."""
    config, h, T = dataclasses.replace(TEN_MILLION, mtp=MtpConfig()), TEN_HAND, 128
    head, norms, pairs = 2 * 4096 * 256, 2 * 256 + 96 + 64, 4 * (2 * (32 + 16) + 2 * 32) * (T + 1) / 2
    attention = 2 * (h["attention"] - norms)
    moe = 2 * (h["around"] + 4 * h["expert"])
    prefix, stack = attention + 2 * h["dense"], 3 * (attention + moe)
    module = attention + moe + 2 * 2 * 256 * 256
    forward = prefix + stack + module + 5 * pairs + 2 * head
    assert forward_flops_per_token(config, T) == forward
    for trained, backward in {
        "head": 2 * head,
        "mtp/": 2 * module + 2 * pairs + head,
        "final_norm": module + 2 * pairs + 2 * head,
        "stack/mlp": 3 * moe + stack + 6 * pairs + module + 2 * pairs + 2 * head,
        "prefix/0/attention/": attention + prefix + stack + module + 10 * pairs + 2 * head,
        "embedding": prefix + stack + module + 10 * pairs + 2 * head,
    }.items():
        got = train_flops_per_token(config, T, lambda path, trained=trained: path.startswith(trained))
        assert got == forward + backward, trained


@pytest.mark.parametrize("tied", [True, False])
def test_flops_against_the_compiler(tied):
    """XLA counts the products of a dense model; what is not a product (norms, softmax) is a few per cent at this width."""
    B, T = 2, 64
    config = TransformerConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=2,
        attention=GqaConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=32),
        mlp=MlpConfig(intermediate_size=384),
        moe=None,
        precision=FLOAT32,
        tie_word_embeddings=tied,
        scan_layers=False,  # the compiler counts the body of a loop once
    )
    model = PureModel(config)

    def forward(tree, tokens):
        transformer = model.merge(tree["params"], tree["buffers"])
        return transformer.logits(transformer(tokens, tokens, tokens).hidden_BTD)

    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    compiler = jax.jit(forward).lower(model.abstract(), tokens).cost_analysis()["flops"] / (B * T)
    # A short row is one block, so every query multiplies all keys: T instead of (T + 1) / 2.
    ours = forward_flops_per_token(config, 2 * T - 1)
    assert ours < compiler < 1.1 * ours


@pytest.mark.parametrize(("compute", "size"), [("bfloat16", 2), ("float32", 4)])
def test_cache_bytes(compute, size):
    """The report's point: 576 numbers a layer and token, where 128 heads of keys and values would be 57 times as many."""
    config = dataclasses.replace(V3, precision=dataclasses.replace(V3.precision, compute=compute))
    assert cache_bytes_per_token(config) == 61 * (512 + 64) * size
    grouped = dataclasses.replace(
        config, attention=GqaConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    )
    assert cache_bytes_per_token(grouped) == 61 * 2 * 2 * 16 * size


def test_cache_bytes_are_those_of_the_buffers():
    for attention in (TEN_MILLION.attention, GqaConfig(), DsaConfig(), DsaConfig(index_fp8=True)):
        config = dataclasses.replace(TEN_MILLION, attention=attention)
        tree = PureModel(config)
        shapes = tree.abstract()

        def empty(tree=tree, shapes=shapes):
            arrays = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return tree.merge(arrays["params"], arrays["buffers"]).empty_cache(3, 5)

        cache = jax.eval_shape(empty)
        total = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        assert total == 15 * cache_bytes_per_token(config)
