"""What sparse attention is for: finding needles in a haystack as well as dense attention does, at a fraction of its keys.

A row hides 6 needles, each a token that stands for a key and a value, among 59 tokens of noise; then keys are asked for, and the
token after each must be the value of its needle. Each query attends to 8 of up to 128 keys: it must know which.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import ExperimentConfig, LossConfig, TrainConfig
from experiments.optim.adamw import AdamWConfig
from experiments.optim.schedule import ConstantConfig, WsdConfig
from experiments.step import init_state, make_eval_step, make_train_step
from mdl.attention.dsa import DsaConfig
from mdl.attention.mla import MlaConfig
from mdl.mlp import MlpConfig
from mdl.precision import PrecisionConfig
from mdl.pure import PureModel
from mdl.transformer import TransformerConfig

KEYS, VALUES, NOISE = 8, 8, 32
HAY, NEEDLES, ASKED = 65, 6, 32
ASK, ANSWER = KEYS * VALUES, KEYS * VALUES + KEYS  # the first tokens that ask for a key and answer with a value
FIRST_NOISE = ANSWER + VALUES
ROWS, LENGTH, SELECTED = 16, HAY + 2 * ASKED, 8

MLA = MlaConfig(
    num_attention_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
)
DENSE = ExperimentConfig(
    model=TransformerConfig(
        vocab_size=FIRST_NOISE + NOISE,
        hidden_size=64,
        num_hidden_layers=2,
        attention=MLA,
        mlp=MlpConfig(intermediate_size=128),
        moe=None,
        initializer_range=0.125,
        precision=PrecisionConfig(compute="float32"),
    ),
    loss=LossConfig(mtp_loss_weight=None, aux_loss_alpha=None, bias_update_speed=None),
    optim=AdamWConfig(learning_rate=4e-3, schedule=WsdConfig(warmup_steps=20), weight_decay=0.0),
    train=TrainConfig(num_steps=400, batch_size=ROWS, seq_len=LENGTH - 1),
)
ALL_BUT_INDEXERS = ("embedding", "head", "final_norm/*", "*/attention_norm/*", "*/dense/*", "*/mlp_norm/*", "*/mlp/*")


def sparse(*, steps: int, warmup: bool = False, trainable: tuple[str, ...] | None = None) -> ExperimentConfig:
    attention = DsaConfig(dense=MLA, index_n_heads=4, index_head_dim=32, index_topk=SELECTED, warmup=warmup)
    trains_indexers = trainable != ALL_BUT_INDEXERS
    return dataclasses.replace(
        DENSE,
        model=dataclasses.replace(DENSE.model, attention=attention),
        loss=dataclasses.replace(DENSE.loss, indexer_loss_weight=1.0 if trains_indexers else None),
        optim=AdamWConfig(learning_rate=3e-3 if warmup else 1e-3, schedule=ConstantConfig(), weight_decay=0.0),
        train=dataclasses.replace(DENSE.train, num_steps=steps, trainable=trainable),
    )


def rows(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A step's batch, [1, B, T + 1]."""
    tokens = FIRST_NOISE + rng.integers(0, NOISE, (ROWS, LENGTH))
    for row in tokens:
        keys, values = rng.permutation(KEYS)[:NEEDLES], rng.integers(0, VALUES, NEEDLES)
        row[rng.permutation(HAY)[:NEEDLES]] = keys * VALUES + values
        asked = rng.integers(0, NEEDLES, ASKED)
        row[HAY::2], row[HAY + 1 :: 2] = ASK + keys[asked], ANSWER + values[asked]
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    found = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    return {name: array[None].astype(np.int32) for name, array in found.items()}


def trained(config: ExperimentConfig, params, seed: int):
    """The parameters after all steps."""
    config.check_training()
    config.check_parameters()
    model, rng = PureModel(config.model), np.random.default_rng(seed)
    tree = None if params is None else {"params": params, "buffers": {}}
    state = jax.jit(lambda tree: init_state(config, model, tree))(tree)
    step = jax.jit(make_train_step(config, model), donate_argnums=0)
    for _ in range(config.train.num_steps):
        state, _ = step(state, rows(rng), jnp.float32(0))
        jax.block_until_ready(state)
    return state["params"]


def accuracy(config: ExperimentConfig, params) -> float:
    """Share of the answers that are the most likely token, of 1,024."""
    model = PureModel(config.model)

    @jax.jit
    def right(params, batch):
        transformer = model.merge(params, {})
        inputs = (batch[name][0, :, :-1] for name in ("tokens", "positions", "segment_ids"))
        logits_BTV = transformer.logits(transformer(*inputs).hidden_BTD)
        return jnp.argmax(logits_BTV, axis=-1)[:, HAY::2] == batch["tokens"][0, :, HAY + 1 :: 2]

    rng = np.random.default_rng(99)
    return float(np.mean([right(params, rows(rng)) for _ in range(2)]))


def indexers(config: ExperimentConfig, params) -> dict[str, float]:
    """KL, KL to uniform and recall, means over tokens and layers."""
    batch = {name: array[0] for name, array in rows(np.random.default_rng(98)).items()}
    sums = jax.jit(make_eval_step(PureModel(config.model)))(params, {}, batch)
    return {name: float(jnp.mean(of_layer) / sums.tokens) for name, of_layer in sums.indexer._asdict().items()}


def with_indexers(dense, config: ExperimentConfig):
    """The dense parameters beside indexers as they are drawn."""
    drawn = jax.jit(PureModel(config.model).init)(jax.random.key(1))["params"]["stack"]["attention"]["indexer"]
    stack = {**dense["stack"], "attention": {"indexer": drawn, "dense": dense["stack"]["attention"]}}
    return {**dense, "stack": stack}


@pytest.mark.slow
def test_a_trained_indexer_finds_what_a_random_one_does_not():
    """Within 2 points of dense attention, at a sixteenth of its keys."""
    warmup = sparse(steps=200, warmup=True, trainable=("*/indexer/*",))
    both, others = sparse(steps=100), sparse(steps=100, trainable=ALL_BUT_INDEXERS)
    dense = trained(DENSE, None, 0)
    drawn = with_indexers(dense, warmup)
    warm = trained(warmup, drawn, 1)
    stages = {  # of the model as it attends to 8 keys
        "indexer drawn": (both, drawn),
        "and the rest trained": (others, trained(others, drawn, 2)),
        "indexer warmed up": (both, warm),
        "and all trained": (both, trained(both, warm, 2)),
    }

    reached = {"dense": accuracy(DENSE, dense)} | {name: accuracy(*stage) for name, stage in stages.items()}
    found = {name: indexers(*stage) for name, stage in {"over all keys": (warmup, warm), **stages}.items()}
    print("".join(f"\n{name:22} accuracy {share:.3f}" for name, share in reached.items()))
    for name, means in found.items():
        print(f"{name:22} " + "  ".join(f"{key} {value:.3f}" for key, value in means.items()))

    assert reached["dense"] > 0.95
    assert accuracy(warmup, warm) == reached["dense"]  # nothing but indexers has moved
    assert found["over all keys"]["kl"] < 0.5 * found["over all keys"]["uniform"]
    assert reached["and all trained"] > reached["dense"] - 0.02
    assert found["and all trained"]["kl"] < 0.5 * found["and all trained"]["uniform"]
    assert reached["and the rest trained"] < reached["dense"] - 0.2
