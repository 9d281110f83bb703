"""Rotary settings of a config.json: `rope_theta` and `rope_scaling` as on the hub, or `rope_parameters` as in newer files."""

import dataclasses
from typing import Any

from mdl.hf.fields import Fields
from mdl.rope import AnyRope, Llama3RopeConfig, RopeConfig, YarnConfig

KINDS: dict[type[RopeConfig], str] = {RopeConfig: "default", YarnConfig: "yarn", Llama3RopeConfig: "llama3"}


def rope(fields: Fields) -> AnyRope:
    """The frequencies that both spellings describe; ValueError for kinds of scaling that are not supported."""
    fields.only("partial_rotary_factor", 1.0, 1)
    modern = fields.has("rope_parameters")
    settings = fields.child("rope_parameters" if modern else "rope_scaling")
    if modern and fields.has("rope_scaling"):
        raise fields.refusal("rope_scaling", "stands beside rope_parameters; remove one of the two")
    settings.only("partial_rotary_factor", 1.0, 1)
    outer = fields.optional_number("rope_theta")
    inner = settings.optional_number("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        raise fields.refusal("rope_theta", f"rope_parameters say {inner}")
    theta = next((value for value in (inner, outer) if value is not None), 10000.0)

    kinds = [settings.text(name) for name in ("rope_type", "type") if settings.has(name)] or ["default"]
    if len(set(kinds)) > 1:
        raise settings.refusal("rope_type", f"type says {kinds[1]}")
    built: AnyRope
    if kinds[0] == "default":
        built = RopeConfig(rope_theta=theta)
    elif kinds[0] == "yarn":
        settings.only("truncate", True)
        built = YarnConfig(
            rope_theta=theta,
            factor=settings.number("factor"),
            original_max_position_embeddings=_original_length(fields, settings),
            beta_fast=settings.number("beta_fast", 32.0),
            beta_slow=settings.number("beta_slow", 1.0),
            mscale=settings.optional_number("mscale"),
            mscale_all_dim=settings.optional_number("mscale_all_dim"),
            attention_factor=settings.optional_number("attention_factor"),
        )
    elif kinds[0] == "llama3":
        built = Llama3RopeConfig(
            rope_theta=theta,
            factor=settings.number("factor"),
            low_freq_factor=settings.number("low_freq_factor"),
            high_freq_factor=settings.number("high_freq_factor"),
            original_max_position_embeddings=_original_length(fields, settings),
        )
    else:
        raise settings.refusal(
            "rope_type" if settings.has("rope_type") else "type", "only default, yarn and llama3 are supported"
        )
    settings.refuse_unread()
    return built


def rope_json(config: AnyRope) -> dict[str, Any]:
    """The fields in the hub's spelling, which new code reads too; the kind under both of its names."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    theta, kind = settings.pop("rope_theta"), KINDS[type(config)]
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, "type": kind, **settings} if settings else None}


def _original_length(fields: Fields, settings: Fields) -> int:
    return settings.integer("original_max_position_embeddings", fields.integer("max_position_embeddings"))
