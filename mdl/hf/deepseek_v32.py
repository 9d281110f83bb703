"""DeepSeek-V3.2: V3 with an indexer in every layer, that of the MTP module included, which selects the keys to attend to."""

import dataclasses
from typing import Any

from mdl.attention.dsa import DsaConfig
from mdl.attention.mla import MlaConfig
from mdl.hf import deepseek_v3
from mdl.hf.fields import Fields
from mdl.hf.table import Row
from mdl.transformer import TransformerConfig

INDEXER_ROWS = (
    Row("self_attn.indexer.wq_b.weight", "attention/indexer/wq_b/weight", "(IJ)Q -> QIJ"),
    Row("self_attn.indexer.wk.weight", "attention/indexer/wk/weight", "JD -> DJ"),
    Row("self_attn.indexer.k_norm.weight", "attention/indexer/k_norm/weight", "J -> J"),
    Row("self_attn.indexer.k_norm.bias", "attention/indexer/k_norm/bias", "J -> J"),
    Row("self_attn.indexer.weights_proj.weight", "attention/indexer/weights_proj", "ID -> DI"),
)
ARCHITECTURE = "DeepseekV32ForCausalLM"
# The attention itself lies one level deeper than in V3.
V3_ROWS = tuple(
    dataclasses.replace(row, path=row.path.replace("attention/", "attention/dense/")) for row in deepseek_v3.TABLE.layer
)
TABLE = dataclasses.replace(deepseek_v3.TABLE, layer=(*V3_ROWS, *INDEXER_ROWS))


def model_config(fields: Fields) -> TransformerConfig:
    return sparse(fields, indexer_rope_interleave=False)


def sparse(fields: Fields, *, indexer_rope_interleave: bool) -> TransformerConfig:
    """What this family and its relatives have in common; every layer has an indexer."""
    fields.only("rope_interleave", True)
    fields.only("indexer_rope_interleave", indexer_rope_interleave)
    kinds = fields.texts("mlp_layer_types")  # the published code goes by these where they are given
    config = deepseek_v3.model_config(fields, dense_layers=kinds.count("dense") if kinds else None)
    dense = ["dense"] * config.num_prefix_layers if config.moe else ["dense"] * config.num_hidden_layers
    _expect(fields, "mlp_layer_types", dense + ["sparse"] * (config.num_hidden_layers - len(dense)))
    _expect(fields, "layer_types", ["indexed_attention"] * config.num_hidden_layers)
    assert isinstance(config.attention, MlaConfig)
    attention = DsaConfig(
        dense=config.attention,
        index_n_heads=fields.integer("index_n_heads"),
        index_head_dim=fields.integer("index_head_dim"),
        index_topk=fields.integer("index_topk"),
        indexer_rope_interleave=indexer_rope_interleave,
    )
    return dataclasses.replace(config, attention=attention)


def config_json(config: TransformerConfig) -> dict[str, Any]:
    attention = config.attention
    if not isinstance(attention, DsaConfig):
        raise ValueError(f"attention is {type(attention).__name__}, DsaConfig here")
    return deepseek_v3.config_json(dataclasses.replace(config, attention=attention.dense)) | {
        "index_head_dim": attention.index_head_dim,
        "index_n_heads": attention.index_n_heads,
        "index_topk": attention.index_topk,
    }


def _expect(fields: Fields, name: str, layers: list[str]) -> None:
    """Refuses a list of layer kinds that is not the one which the other fields make."""
    if fields.has(name) and fields.texts(name) != layers:
        raise fields.refusal(name, f"does not agree with the other fields, by which the last of them is {layers[-1]}")
