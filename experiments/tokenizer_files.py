"""What stands beside a tokenizer.json: tokenizer_config.json and chat_template.jinja. UserError names file and field."""

import json
import pathlib
from typing import Any

from experiments.errors import UserError


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json, empty if it is missing."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"tokenizer: {path} is not a JSON object ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"tokenizer: {path} is not a JSON object")
    return config


def special_name(config: dict[str, Any], key: str, path: pathlib.Path) -> str | None:
    """The spelling of a special token in `config`, which `path` holds: a text, or an object with its settings."""
    value = config.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str) and value is not None:
        raise UserError(f"tokenizer: {path}: {key}={value!r}: a text is expected")
    return name


def chat_template(config: dict[str, Any], path: pathlib.Path) -> str | None:
    """chat_template.jinja beside `path`, or the field of `config`: a text, or a list of named ones (`default`, else the first)."""
    file = path.with_name("chat_template.jinja")
    try:
        if file.is_file():
            return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer: {file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {entry.get("name"): entry.get("template") for entry in reversed(template)}
        template = named.get("default", template[0].get("template") if template else None)
    if template is not None and not isinstance(template, str):
        raise UserError(f"tokenizer: {path}: chat_template: a text, or a list of texts with names, is expected")
    return template
