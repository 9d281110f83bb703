"""The small files that travel with the weights, byte for byte."""

import pathlib
import shutil

# Beside config.json in a Hugging Face directory, below `tokenizer` in ours. Code is none of them.
_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_companions(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what is there; `target` is made if anything is."""
    for name in _NAMES:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    for template in sorted((source / "additional_chat_templates").glob("*.jinja")):
        (target / "additional_chat_templates").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template, target / "additional_chat_templates" / template.name)
