"""Llama 2 and 3: grouped-query attention, dense layers, plain or llama3 rotary frequencies."""

from typing import Any

from mdl.hf.decoder import (
    GQA_ROWS,
    MLP_ROWS,
    MODEL_ROWS,
    NORM_ROWS,
    TIED_ROWS,
    grouped_query_attention,
    grouped_query_json,
    shared,
)
from mdl.hf.fields import Fields
from mdl.hf.table import Table
from mdl.mlp import MlpConfig
from mdl.transformer import TransformerConfig

ARCHITECTURE = "LlamaForCausalLM"
TABLE = Table(model=MODEL_ROWS, layer=NORM_ROWS + GQA_ROWS + MLP_ROWS, tied=TIED_ROWS)


def model_config(fields: Fields) -> TransformerConfig:
    return TransformerConfig(
        **shared(fields),
        attention=grouped_query_attention(fields, qk_norm=False),
        mlp=MlpConfig(intermediate_size=fields.integer("intermediate_size")),
        moe=None,
    )


def config_json(config: TransformerConfig) -> dict[str, Any]:
    return grouped_query_json(config) | {"mlp_bias": False}
