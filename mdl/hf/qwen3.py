"""Qwen3, dense: grouped-query attention with a norm of every query and key head before the rotation."""

from typing import Any

from mdl.hf.decoder import (
    GQA_ROWS,
    MLP_ROWS,
    MODEL_ROWS,
    NORM_ROWS,
    QK_NORM_ROWS,
    TIED_ROWS,
    grouped_query_attention,
    grouped_query_json,
    only_full_attention,
    shared,
)
from mdl.hf.fields import Fields
from mdl.hf.table import Table
from mdl.mlp import MlpConfig
from mdl.transformer import TransformerConfig

ARCHITECTURE = "Qwen3ForCausalLM"
TABLE = Table(model=MODEL_ROWS, layer=NORM_ROWS + GQA_ROWS + QK_NORM_ROWS + MLP_ROWS, tied=TIED_ROWS)
DEFAULT_HEAD_DIM = 128  # of files that leave it out


def model_config(fields: Fields) -> TransformerConfig:
    only_full_attention(fields)
    return TransformerConfig(
        **shared(fields),
        attention=grouped_query_attention(fields, qk_norm=True, head_dim=DEFAULT_HEAD_DIM),
        mlp=MlpConfig(intermediate_size=fields.integer("intermediate_size")),
        moe=None,
    )


def config_json(config: TransformerConfig) -> dict[str, Any]:
    return grouped_query_json(config) | {"use_sliding_window": False}
