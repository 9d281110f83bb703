"""GLM-5: DeepSeek-V3.2 with another pair layout in its indexers and, from GLM-5.2 on, layers that share that of one before."""

import dataclasses
from typing import Any

from mdl.attention.dsa import DsaConfig
from mdl.hf import deepseek_v32
from mdl.hf.fields import Fields
from mdl.transformer import TransformerConfig

ARCHITECTURE = "GlmMoeDsaForCausalLM"
TABLE = deepseek_v32.TABLE
_LETTERS = {"F": "full", "S": "shared"}


def model_config(fields: Fields) -> TransformerConfig:
    config = deepseek_v32.sparse(fields, indexer_rope_interleave=True)
    types = tuple(_indexer_types(fields, config.num_hidden_layers))
    if set(types) <= {"full"}:
        return config
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, indexer_types=types))


def config_json(config: TransformerConfig) -> dict[str, Any]:
    found = deepseek_v32.config_json(config)
    attention = config.attention
    assert isinstance(attention, DsaConfig)
    types = attention.indexer_types or ("full",) * config.num_hidden_layers
    return found | {"indexer_rope_interleave": True, "indexer_types": list(types)}


def _indexer_types(fields: Fields, layers: int) -> list[str]:
    """The list, or what stands for it: a text of letters, or how often there is an indexer behind the first few layers."""
    for name in ("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"):
        fields.ignore(name)
    if fields.has("indexer_types"):
        name, types = "indexer_types", fields.texts("indexer_types")
    elif fields.has("index_topk_pattern"):
        name = "index_topk_pattern"
        types = [_LETTERS.get(letter, letter) for letter in fields.text(name)]
    else:
        name, every = "index_topk_freq", max(fields.integer("index_topk_freq", 1), 1)
        first = fields.integer("index_skip_topk_offset", 2)
        types = ["shared" if max(layer - first + 1, 0) % every else "full" for layer in range(layers)]
    if len(types) != layers or not set(types) <= {"full", "shared"} or types[0] != "full":
        raise fields.refusal(name, f"{layers} layers, each full or shared and the first full, are expected")
    return types
