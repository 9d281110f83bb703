"""The model of small.py with sparse attention, each query to 6 of up to 16 keys. `small_dsa.py:CORPUS` as there."""

import dataclasses
import pathlib

from experiments.cli import load_config
from experiments.config import ExperimentConfig
from mdl.attention.dsa import DsaConfig
from mdl.attention.mla import MlaConfig


def get_config(arg: str = "corpus/*.txt") -> ExperimentConfig:
    config = load_config(f"{pathlib.Path(__file__).with_name('small.py')}:{arg}", ExperimentConfig)
    dense = config.model.attention
    assert isinstance(dense, MlaConfig)
    attention = DsaConfig(dense=dense, index_n_heads=2, index_head_dim=8, index_topk=6)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention=attention),
        loss=dataclasses.replace(config.loss, indexer_loss_weight=1.0),
    )
