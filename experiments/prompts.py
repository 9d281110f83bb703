"""What is to be continued: texts from a flag or a file, or messages through a chat template, and their tokens."""

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING

from experiments.errors import UserError

if TYPE_CHECKING:
    from experiments.tokenizer import Tokenizer

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str | None  # none: given as ids
    ids: list[int]
    seed: int


def read_file(path: str, seed: int) -> list[tuple[str, int]]:
    """Texts and seeds of a file: one text a line, or .jsonl with "prompt" and, where it is not `seed`, "seed"."""
    where = f"--prompts={path}"
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{where}: holds no prompt")
    if pathlib.Path(path).suffix != ".jsonl":
        return [(line, seed) for _, line in numbered]
    return [_read_line(line, f"{where}: line {number}", seed) for number, line in numbered]


def _read_line(line: str, where: str, seed: int) -> tuple[str, int]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UserError(f'{where}: an object with the text "prompt" is expected')
    if "seed" in entry:
        seed = entry["seed"]
        if type(seed) is not int:
            raise UserError(f"{where}: seed={seed!r} is not an integer")
        check_seed(seed, f"{where}: seed=")
    return entry["prompt"], seed


def check_seed(seed: int, where: str = "--seed=") -> None:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"{where}{seed}: must be between 0 and {MAX_SEED}")


def encode(texts: list[tuple[str, int]], tokenizer: "Tokenizer", *, bos: bool, chat: bool) -> list[Prompt]:
    """Prompts of texts and seeds. chat: each text is a message of the user, put through the chat template."""
    if chat:
        from experiments.chat_template import encode_chat

        ids = [encode_chat(tokenizer, [{"role": "user", "content": text}], bos=bos) for text, _ in texts]
    else:
        ids = [tokenizer.encode(text, bos=bos) for text, _ in texts]
    if not all(ids):
        raise UserError("an empty prompt cannot be continued without BOS; give text or --bos")
    return [Prompt(text, row, seed) for (text, seed), row in zip(texts, ids, strict=True)]
