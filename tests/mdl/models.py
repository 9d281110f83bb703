"""Small models with random parameters and a packed batch, for the tests of this folder."""

import dataclasses
import functools
import zlib

import jax
import numpy as np

from mdl.attention.dsa import DsaConfig
from mdl.attention.gqa import GqaConfig
from mdl.attention.mla import MlaConfig
from mdl.loss import LossWeights, count_targets, loss_terms
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.mtp import MtpConfig
from mdl.precision import PrecisionConfig
from mdl.pure import PureModel
from mdl.rope import Llama3RopeConfig, YarnConfig
from mdl.transformer import TransformerConfig

FLOAT32 = PrecisionConfig(compute="float32")
T, V = 12, 64

V3 = TransformerConfig(
    vocab_size=V,
    hidden_size=16,
    num_hidden_layers=3,
    attention=MlaConfig(
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=8,
        v_head_dim=4,
        rope=YarnConfig(
            rope_theta=100.0, factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.0
        ),
    ),
    mlp=MlpConfig(intermediate_size=24),
    moe=MoeConfig(
        moe_intermediate_size=6,
        router=RouterConfig(n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2),
    ),
    mtp=MtpConfig(num_nextn_predict_layers=2),
    precision=FLOAT32,
)
# No query latent, half-split rotary pairs, softmax affinities that are not normalized, groups by their best expert.
V2 = dataclasses.replace(
    V3,
    attention=dataclasses.replace(
        V3.attention, q_lora_rank=None, rope_interleave=False, rope=YarnConfig(factor=8.0, rope_theta=50.0)
    ),
    moe=MoeConfig(
        moe_intermediate_size=6,
        n_shared_experts=2,
        router=RouterConfig(
            n_routed_experts=8,
            num_experts_per_tok=2,
            scoring_func="softmax",
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            norm_topk_prob=False,
            routed_scaling_factor=1.5,
        ),
    ),
    mtp=None,
)
# Grouped queries, no shared expert, tied embeddings, one MTP module.
QWEN = dataclasses.replace(
    V3,
    num_hidden_layers=2,
    attention=GqaConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        qk_norm=True,
        rope=Llama3RopeConfig(rope_theta=100.0, factor=4.0, original_max_position_embeddings=64),
    ),
    moe=MoeConfig(
        moe_intermediate_size=6,
        n_shared_experts=0,
        router=RouterConfig(
            n_routed_experts=8,
            num_experts_per_tok=2,
            scoring_func="softmax",
            topk_method="greedy",
            routed_scaling_factor=1.0,
        ),
    ),
    first_k_dense_replace=0,
    mtp=MtpConfig(),
    tie_word_embeddings=True,
)
# Each query attends to four keys; rotary channels do not fill an indexer head.
V32 = dataclasses.replace(
    V3,
    attention=DsaConfig(dense=V3.attention, index_n_heads=2, index_head_dim=10, index_topk=4),
    mtp=MtpConfig(),
)
# As the published inference code scores; a rotation takes a power of two.
V32_FP8 = dataclasses.replace(
    V32, attention=dataclasses.replace(V32.attention, index_head_dim=16, index_hadamard=True, index_fp8=True)
)
CONFIGS = {"v3": V3, "v2": V2, "qwen": QWEN, "v32": V32}


def random_leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Large enough that every part matters: norms about one, matrices that keep the scale, biases that make scores negative."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    noise = rng.standard_normal(shape).astype(np.float32)
    if "norm" in path:
        return 1 + 0.2 * noise
    if path.endswith("['bias']"):
        return (-0.6 + 0.3 * noise).astype(np.float32)
    if path.endswith("['router']['weight']"):
        return 0.5 * noise
    return noise if path.endswith("['embedding']") else 0.3 * noise


def random_tree(shapes):
    return jax.tree_util.tree_map_with_path(lambda p, s: random_leaf(jax.tree_util.keystr(p), s.shape), shapes)


@functools.cache
def pure(config: TransformerConfig) -> PureModel:
    return PureModel(config)


@functools.cache
def parameters(config: TransformerConfig):
    """{"params", "buffers"} in NumPy float32, the same for every variant of a config with the same shapes."""
    return random_tree(pure(config).abstract())


def packed_batch(lengths: list[list[int]], *, length: int = T, vocab: int = V, seed: int = 0) -> dict[str, np.ndarray]:
    """One row of documents of these lengths for each entry, padded to length + 1; [1, B, T + 1]."""
    rng = np.random.default_rng(seed)
    shape = (1, len(lengths), length + 1)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["tokens"][:] = rng.integers(0, vocab, shape)  # padding too: what stands there must not matter
    for row, documents in enumerate(lengths):
        start = 0
        for i, size in enumerate(documents):
            batch["segment_ids"][0, row, start : start + size] = i + 1
            batch["positions"][0, row, start : start + size] = np.arange(size)
            start += size
        assert start <= length + 1
    return batch


# Documents that end at, before and on the last token, of every small length; rows of unequal counts, one of them empty.
LENGTHS = [[13], [5, 4, 4], [1, 6, 5, 1], [3], [], [2, 2], [7], [9, 3]]
BATCH = packed_batch(LENGTHS)


def split(batch: dict[str, np.ndarray], parts: int) -> dict[str, np.ndarray]:
    """The same rows as `parts` micro-batches."""
    return {name: x.reshape(parts, -1, x.shape[-1]) for name, x in batch.items()}


def leaves(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


Z = 0.05
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # half the time; what XLA does before LLVM stays the same


@functools.cache
def gradient_of(config, indexer=0.0):
    """(params, buffers, batch [1, B, T + 1], mtp weight, balance weight) -> (gradients, terms)."""

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    @functools.partial(jax.grad, has_aux=True)
    def run(params, buffers, batch, mtp, balance):
        counts = count_targets(batch["segment_ids"], config.mtp.num_nextn_predict_layers if config.mtp else 0)
        micro_batch = {name: x[0] for name, x in batch.items()}
        weights = LossWeights(mtp, balance, Z, indexer)
        terms = loss_terms(pure(config).merge(params, buffers), micro_batch, weights, counts)
        return terms.loss, terms

    return run


def result(config, batch=BATCH, *, mtp=0.5, balance=0.7, indexer=0.0):
    tree = parameters(config)
    grads, terms = gradient_of(config, indexer)(tree["params"], tree["buffers"], batch, mtp, balance)
    return leaves(grads), jax.device_get(terms)
