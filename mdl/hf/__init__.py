"""Names and layouts of Hugging Face checkpoints, read in both directions; one file per family."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

from mdl.attention.dsa import DsaConfig
from mdl.hf import deepseek_v2, deepseek_v3, deepseek_v32, glm_moe_dsa, llama, qwen3, qwen3_moe
from mdl.hf.fields import Fields
from mdl.hf.table import Table
from mdl.kernels import KernelsConfig
from mdl.moe.transport_ring import RingConfig
from mdl.precision import PrecisionConfig
from mdl.transformer import TransformerConfig


class Family(Protocol):
    """What a family's file offers."""

    @property
    def TABLE(self) -> Table: ...

    @property
    def ARCHITECTURE(self) -> str:  # name of the model's class in the published code
        ...

    def model_config(self, fields: Fields) -> TransformerConfig: ...

    def config_json(self, config: TransformerConfig) -> dict[str, Any]:
        """The family's fields. They need not fit: ValueError is raised for a model that cannot be written down at all."""
        ...


# model_type of config.json -> family; the first that can hold a model names it
FAMILIES: dict[str, Family] = {
    "deepseek_v3": deepseek_v3,
    "deepseek_v2": deepseek_v2,
    "deepseek_v32": deepseek_v32,
    "glm_moe_dsa": glm_moe_dsa,
    "llama": llama,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "kimi_k2": deepseek_v3,  # the same files under another name
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


def config_json(
    config: TransformerConfig, *, bos_token_id: int | None = None, eos_token_id: int | list[int] | None = None
) -> dict[str, Any]:
    """The config.json of the first family that can hold the model, in the spelling that old and new public code reads.

    `model_config` of it equals `config` in all that changes the model's numbers; its dtype is that of the parameters. ValueError
    says of every family why it cannot.
    """
    reasons = []
    for model_type, family in FAMILIES.items():
        try:
            fields = {
                "architectures": [family.ARCHITECTURE],
                "bos_token_id": bos_token_id,
                "eos_token_id": eos_token_id,
                "model_type": model_type,
                **family.config_json(config),
            }
            differences = list(_differences(_numbers(config), _numbers(model_config(fields))))
        except ValueError as error:
            differences = [str(error)]
        if not differences:
            return fields
        reasons.append(f"{model_type}: {', '.join(differences)}")
    raise ValueError(f"no family can hold this model ({'; '.join(reasons)})")


def _numbers(config: TransformerConfig) -> TransformerConfig:
    """Without what a config.json does not say: how the model is computed."""
    attention = config.attention
    if isinstance(attention, DsaConfig):
        attention = dataclasses.replace(attention, index_hadamard=False, index_fp8=False)
    return dataclasses.replace(
        config,
        attention=attention,
        first_k_dense_replace=config.num_prefix_layers,
        precision=PrecisionConfig(param=config.precision.param),
        moe=config.moe and dataclasses.replace(config.moe, transport=RingConfig()),
        kernels=KernelsConfig(),
        scan_layers=True,
        remat="none",
    )


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    if ours == theirs:
        return
    if not dataclasses.is_dataclass(ours) or type(ours) is not type(theirs):
        yield f"{name} is {_spell(ours)}, {_spell(theirs)} here"
        return
    for field in dataclasses.fields(ours):
        below = f"{name}.{field.name}" if name else field.name
        yield from _differences(getattr(ours, field.name), getattr(theirs, field.name), below)


def _spell(value: Any) -> str:
    return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)
