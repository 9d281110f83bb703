"""Qwen3, dense: grouped-query attention with a norm of every query and key head before the rotation."""

from mdl.hf.decoder import (
    GQA_ROWS,
    MLP_ROWS,
    MODEL_ROWS,
    NORM_ROWS,
    QK_NORM_ROWS,
    TIED_ROWS,
    grouped_query_attention,
    only_full_attention,
    shared,
)
from mdl.hf.fields import Fields
from mdl.hf.table import Table
from mdl.mlp import MlpConfig
from mdl.transformer import TransformerConfig

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
