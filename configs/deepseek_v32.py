"""DeepSeek-V3.2, DeepSeek-V3 with sparse attention (DeepSeek-V3.2-Exp report, section 2, and the released configuration file).

The two stages of continued training as published (section 2.1), rows of 128K tokens each:

    --config=configs/deepseek_v32.py:warmup    the indexers alone learn, from dense attention; init_from: a DeepSeek-V3 checkpoint
    --config=configs/deepseek_v32.py:sparse    all parameters, attention to 2,048 keys; init_from: the run of the first stage

Without an argument it is the second, which is also what scores, generates and is converted. The corpus is not public: set
`data.source`. What the report leaves open is as it was at the end of V3's pre-training.
"""

import dataclasses

from configs import deepseek_v3
from experiments.config import ExperimentConfig, LossConfig, TrainConfig
from experiments.errors import UserError
from experiments.optim.adamw import AdamWConfig
from experiments.optim.schedule import ConstantConfig, PiecewiseConfig
from mdl.attention.dsa import DsaConfig
from mdl.attention.mla import MlaConfig
from mdl.rope import YarnConfig
from mdl.sharding import MeshConfig

SEQ_LEN = 131072


def get_config(arg: str | None = None) -> ExperimentConfig:
    if arg not in (None, "warmup", "sparse"):
        raise UserError(f"{arg!r} is no stage of training; the stages are warmup and sparse")
    config = deepseek_v3.get_config()
    dense, optim = config.model.attention, config.optim
    assert isinstance(dense, MlaConfig) and isinstance(optim, AdamWConfig)
    rope = YarnConfig(
        rope_theta=10000.0,
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    attention = DsaConfig(
        dense=dataclasses.replace(dense, rope=rope),
        index_n_heads=64,
        index_head_dim=128,
        index_topk=2048,
        warmup=arg == "warmup",
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention=attention, max_position_embeddings=163840),
        loss=LossConfig(
            mtp_loss_weight=PiecewiseConfig(values=(0.1,)),
            aux_loss_alpha=1e-4,
            bias_update_speed=None,
            indexer_loss_weight=1.0,
        ),
        optim=dataclasses.replace(
            optim, learning_rate=1e-3 if arg == "warmup" else 7.3e-6, schedule=ConstantConfig(warmup_steps=0)
        ),
        train=(
            TrainConfig(num_steps=1000, batch_size=16, seq_len=SEQ_LEN, trainable=("*/indexer/*",))  # 2.1B tokens
            if arg == "warmup"
            else TrainConfig(num_steps=15000, batch_size=480, seq_len=SEQ_LEN, grad_accum_steps=30)  # 943.7B tokens
        ),
        # A row of 128K tokens to each of 16 groups of devices, which share heads.
        mesh=MeshConfig(data=1, fsdp=1, expert=16, tensor=None),
    )
