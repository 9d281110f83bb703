"""DeepSeek-V3.2, DeepSeek-V3 with sparse attention (DeepSeek-V3.2-Exp report, section 2, and the released configuration file).

A model to score, generate from and convert, and whose parameters can be counted: training is refused until the indexer can be
trained. Data and optimization are those of V3, not of the continued training that made it.
"""

import dataclasses

from configs import deepseek_v3
from experiments.config import ExperimentConfig
from mdl.attention.dsa import DsaConfig
from mdl.attention.mla import MlaConfig
from mdl.rope import YarnConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
    config = deepseek_v3.get_config(arg)
    dense = config.model.attention
    assert isinstance(dense, MlaConfig)
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
        dense=dataclasses.replace(dense, rope=rope), index_n_heads=64, index_head_dim=128, index_topk=2048
    )
    model = dataclasses.replace(config.model, attention=attention, max_position_embeddings=163840)
    return dataclasses.replace(config, model=model)
