"""Continues text with a trained model.

    python -m experiments.generate --checkpoint=runs/tiny --prompt='def fib(n):' --max_new_tokens=64 --temperature=0
    python -m experiments.generate --checkpoint=path/to/Qwen3-0.6B --chat --prompt='What is a monad?'
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from typing import TYPE_CHECKING

from experiments.cli import parse_flags, run_main
from experiments.errors import UserError

if TYPE_CHECKING:
    from experiments.continuation import Continuation
    from experiments.loading import LoadedModel, ModelSource
    from experiments.tokenizer import Tokenizer
    from mdl.generate import Sampling

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    checkpoint: str  # run directory, one step of a run, or Hugging Face directory
    prompt: str | None = None  # text to continue; it and its continuation are printed as they come
    prompts: str | None = None  # file of texts, continued as one batch: one per line, or .jsonl with "prompt", "seed"
    prompt_ids: tuple[int, ...] | None = None  # tokens to continue, printed as ids where there is no tokenizer
    out: str | None = None  # .jsonl file for prompt, text, ids and finish (eos, stop, length); none: print them
    max_new_tokens: int = 128  # tokens to add at most
    temperature: float = 0.0  # 0 takes the most likely token; 1 samples as trained
    top_k: int | None = None  # choose among the k most likely tokens
    top_p: float | None = None  # then among the fewest whose probabilities sum to p
    seed: int = 0  # the same seed continues a prompt in the same way, whatever else is in the batch
    stop: str | None = None  # text that ends a continuation (\n for a new line); several as a JSON list
    eos: bool = True  # the tokenizer's EOS ends a continuation
    bos: bool | None = None  # put BOS in front; none: as in training, for a Hugging Face directory as its files say
    chat: bool = False  # each prompt is a message of the user, put through the chat template
    ema: bool = False  # use the averaged parameters of the run

    def __post_init__(self):
        if [self.prompt, self.prompts, self.prompt_ids].count(None) != 2:
            raise ValueError("give one of --prompt=TEXT, --prompts=FILE and --prompt_ids=1,2,3")
        if self.chat and self.prompt_ids is not None:
            raise ValueError("--chat puts text through the chat template; give it with --prompt or --prompts")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens={self.max_new_tokens}: must be at least 1")
        _check_seed(self.seed, "--seed=")


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str | None  # none: given as ids
    ids: list[int]
    seed: int


def main(argv: list[str]) -> int:
    """Prints, or writes, the continuations. Raises UserError before the weights are read for whatever can be known by then."""
    flags = parse_flags(argv, GenerateFlags)
    texts = _read_prompts(flags)
    stops = _stops(flags.stop)
    out = pathlib.Path(flags.out) if flags.out is not None else None
    if out and not out.absolute().parent.is_dir():
        raise UserError(f"--out={out}: the directory {out.absolute().parent} does not exist")

    from experiments.backend import set_up_backend
    from experiments.continuation import Continuation
    from experiments.loading import find_model
    from mdl.generate import Sampling, check_prompts

    source = find_model(flags.checkpoint, ema=flags.ema)
    tokenizer = source.tokenizer()
    prompts = _encode(flags, texts, source, tokenizer)
    try:
        sampling = Sampling(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p)
        check_prompts(source.config, [prompt.ids for prompt in prompts], flags.max_new_tokens)
    except ValueError as error:
        raise UserError(str(error)) from error
    if tokenizer is None and stops:
        raise UserError(f"--stop: {flags.checkpoint} has no tokenizer.json, so that its tokens are no text")

    set_up_backend()
    model = source.load()
    eos_id = tokenizer.eos_id if tokenizer and flags.eos else None
    rows = [Continuation(tokenizer, eos_id=eos_id, stop=stops) for _ in prompts]
    is_streamed = out is None and len(prompts) == 1
    between = "\n" if flags.chat else ""
    if is_streamed and prompts[0].text is not None:
        _print(prompts[0].text + between)
    try:
        speed = _run(model, prompts, rows, sampling, flags.max_new_tokens, is_streamed=is_streamed)
    except KeyboardInterrupt:
        _print("\n")
        return 130
    if is_streamed:
        _print("\n")
    elif out:
        _write(out, prompts, rows)
    else:
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            _print(f"--- {i + 1} of {len(prompts)} ({row.finish})\n{prompt.text}{between}{row.text}\n")
    print(speed, file=sys.stderr)
    return 0


def _run(
    model: "LoadedModel",
    prompts: list[Prompt],
    rows: list["Continuation"],
    sampling: "Sampling",
    max_new_tokens: int,
    *,
    is_streamed: bool,
) -> str:
    """Fills the rows; returns a line about speed."""
    import jax

    from experiments.scoring import exact_float32
    from mdl.generate import Generator

    started = first = time.monotonic()
    with jax.set_mesh(model.mesh), exact_float32(model):
        stream = Generator(model.pure, model.arrays).stream(
            [prompt.ids for prompt in prompts],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=[prompt.seed for prompt in prompts],
        )
        for step, token_B in enumerate(stream):
            if step == 0:
                first = time.monotonic()
            for row, token in zip(rows, token_B, strict=True):
                shown = row.push(token)
                if is_streamed:
                    _print(shown if model.tokenizer else f"{token} ")
            if all(row.finish for row in rows):
                break
    seconds = time.monotonic() - first
    for row in rows:
        shown = row.end()
        if is_streamed:
            _print(shown)
    tokens = sum(len(row.ids) for row in rows)
    later = tokens - len(rows)  # the first of each row waits for compilation and for the prompts
    rate = f", then {later / seconds:.1f} tokens/s" if later and seconds else ""
    return f"{tokens} tokens; the first after {first - started:.1f} s{rate}"


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _read_prompts(flags: GenerateFlags) -> list[tuple[str, int]]:
    """Texts and seeds; none for --prompt_ids."""
    if flags.prompt is not None:
        return [(flags.prompt, flags.seed)]
    if flags.prompts is None:
        return []
    try:
        lines = pathlib.Path(flags.prompts).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"--prompts={flags.prompts}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts={flags.prompts}: not UTF-8 ({error.reason} at byte {error.start})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts={flags.prompts}: holds no prompt")
    if pathlib.Path(flags.prompts).suffix != ".jsonl":
        return [(line, flags.seed) for _, line in numbered]
    return [_read_line(line, f"--prompts={flags.prompts}: line {number}", flags.seed) for number, line in numbered]


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
        _check_seed(seed, f"{where}: seed=")
    return entry["prompt"], seed


def _check_seed(seed: int, where: str) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"{where}{seed}: must be between 0 and {MAX_SEED}")


def _stops(stop: str | None) -> list[str]:
    if stop is None:
        return []
    if stop.startswith("["):
        try:
            stops = json.loads(stop)
        except ValueError as error:
            raise UserError(f"--stop={stop}: not a JSON list of texts ({error})") from error
    else:
        escapes = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
        stops = [re.sub(r"\\[nt\\]", lambda match: escapes[match[0]], stop)]
    if not all(isinstance(text, str) and text for text in stops):
        raise UserError(f"--stop={stop}: texts of at least one character are expected")
    return stops


def _encode(
    flags: GenerateFlags, texts: list[tuple[str, int]], source: "ModelSource", tokenizer: "Tokenizer | None"
) -> list[Prompt]:
    if flags.prompt_ids is not None:
        return [Prompt(None, list(flags.prompt_ids), flags.seed)]
    if tokenizer is None:
        raise UserError(f"--checkpoint={flags.checkpoint}: holds no tokenizer.json; give --prompt_ids instead of text")
    bos = source.begins_with_bos(tokenizer) if flags.bos is None else flags.bos
    if flags.chat:
        from experiments.chat_template import encode_chat

        messages = [{"role": "user", "content": text} for text, _ in texts]
        ids = [encode_chat(tokenizer, [message], bos=bos) for message in messages]
    else:
        ids = [tokenizer.encode(text, bos=bos) for text, _ in texts]
    prompts = [Prompt(text, row, seed) for (text, seed), row in zip(texts, ids, strict=True)]
    for prompt in prompts:
        if not prompt.ids:
            raise UserError("an empty prompt cannot be continued without BOS; give text or --bos")
    return prompts


def _write(out: pathlib.Path, prompts: list[Prompt], rows: list["Continuation"]) -> None:
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            for prompt, row in zip(prompts, rows, strict=True):
                entry = {"prompt": prompt.text, "text": row.text, "ids": row.ids, "finish": row.finish}
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        unfinished.replace(out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    run_main(main)
