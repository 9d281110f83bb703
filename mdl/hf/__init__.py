"""Names and layouts of Hugging Face checkpoints, read in both directions; one file per family."""

from typing import Any, Protocol

from mdl.hf import deepseek_v2, deepseek_v3, deepseek_v32, llama, qwen3, qwen3_moe
from mdl.hf.fields import Fields
from mdl.hf.table import Table
from mdl.transformer import TransformerConfig


class Family(Protocol):
    """What a family's file offers."""

    @property
    def TABLE(self) -> Table: ...

    def model_config(self, fields: Fields) -> TransformerConfig: ...


# model_type of config.json -> family
FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "llama": llama,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}


def family(config_json: dict[str, Any]) -> Family:
    """The family that a config.json names; ValueError if it is none of ours."""
    model_type = Fields(config_json).text("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type={model_type!r} is not supported; known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def model_config(config_json: dict[str, Any]) -> TransformerConfig:
    """The model that a config.json describes. ValueError naming field and value for what cannot be honoured."""
    fields = Fields(config_json)
    fields.ignore("model_type")  # `family` reads it
    config = family(config_json).model_config(fields)
    fields.refuse_unread()
    return config
