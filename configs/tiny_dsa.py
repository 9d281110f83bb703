"""A small DeepSeek-V3.2: the model of tiny.py made sparse in the two stages of the report, on a laptop's CPU.

python -m experiments.run --config=configs/tiny.py --workdir=runs/tiny
python -m experiments.run --config=configs/tiny_dsa.py:warmup --config.init_from=runs/tiny --workdir=runs/tiny_dsa_warmup
python -m experiments.run --config=configs/tiny_dsa.py:sparse --config.init_from=runs/tiny_dsa_warmup --workdir=runs/tiny_dsa

The first stage trains the indexers alone, which learn to foresee dense attention; in the second each query attends to the 64 keys
of up to 256 that its indexer scores highest, and everything is trained. Without an argument it is the second.
"""

import dataclasses

from configs import tiny
from experiments.config import ExperimentConfig
from experiments.errors import UserError
from experiments.optim.adamw import AdamWConfig
from experiments.optim.schedule import ConstantConfig
from mdl.attention.dsa import DsaConfig
from mdl.attention.mla import MlaConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
    if arg not in (None, "warmup", "sparse"):
        raise UserError(f"{arg!r} is no stage of training; the stages are warmup and sparse")
    config, is_warmup = tiny.get_config(), arg == "warmup"
    dense = config.model.attention
    assert isinstance(dense, MlaConfig)
    attention = DsaConfig(dense=dense, index_n_heads=4, index_head_dim=32, index_topk=64, warmup=is_warmup)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention=attention),
        loss=dataclasses.replace(
            config.loss,
            indexer_loss_weight=1.0,
            bias_update_speed=None if is_warmup else config.loss.bias_update_speed,
        ),
        optim=AdamWConfig(learning_rate=1e-3 if is_warmup else 2e-4, schedule=ConstantConfig()),
        train=dataclasses.replace(config.train, num_steps=110, trainable=("*/indexer/*",) if is_warmup else None),
    )
