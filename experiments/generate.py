"""Continues text with a trained model.

    python -m experiments.generate --checkpoint=runs/tiny --prompt='def fib(n):' --max_new_tokens=64 --temperature=0
    python -m experiments.generate --checkpoint=runs/tiny --prompt='def fib(n):' --draft=mtp
    python -m experiments.generate --checkpoint=path/to/Qwen3-0.6B --chat --prompt='What is a monad?'
    python -m experiments.generate --checkpoint=runs/tiny --prompts=prompts.jsonl --out=texts.jsonl --batch_size=16

Drafts change how soon a text comes, never the text.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from typing import TYPE_CHECKING, Literal

from experiments.cli import parse_flags, run_main
from experiments.errors import UserError
from experiments.prompts import Prompt, check_seed, encode, read_file

if TYPE_CHECKING:
    from experiments.continuation import Continuation
    from experiments.loading import ModelSource
    from experiments.tokenizer import Tokenizer

REPORT_SECONDS = 5.0  # between two lines of progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    checkpoint: str  # run directory, one step of a run, or Hugging Face directory
    prompt: str | None = None  # text to continue; it and its continuation are printed as they come
    prompts: str | None = None  # file of texts to continue: one per line, or .jsonl with "prompt", "seed"
    prompt_ids: tuple[int, ...] | None = None  # tokens to continue, printed as ids where there is no tokenizer
    out: str | None = None  # .jsonl file for prompt, text, ids and finish (eos, stop, length); none: print them
    batch_size: int = 8  # prompts of a file continued at the same time; one that has ended makes room for the next
    # the MTP modules propose tokens that are verified in one step: the same text in fewer steps
    draft: Literal["mtp"] | None = None
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
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least 1")
        check_seed(self.seed)


def main(argv: list[str]) -> int:
    """Prints, or writes, the continuations. Raises UserError before the weights are read for whatever can be known by then."""
    flags = parse_flags(argv, GenerateFlags)
    texts = [(flags.prompt, flags.seed)] if flags.prompt is not None else []
    if flags.prompts is not None:
        texts = read_file(flags.prompts, flags.seed)
    stops = _stops(flags.stop)
    out = pathlib.Path(flags.out) if flags.out is not None else None
    if out and not out.absolute().parent.is_dir():
        raise UserError(f"--out={out}: the directory {out.absolute().parent} does not exist")

    from experiments.backend import set_up_backend
    from experiments.completion import Completer, check_drafts
    from experiments.continuation import Continuation
    from experiments.loading import find_model
    from mdl.generate import check_prompts
    from mdl.sampling import Sampling

    source = find_model(flags.checkpoint, ema=flags.ema)
    if flags.draft:
        check_drafts(source.config, flags.checkpoint)
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
    completer = Completer(source.load(), drafts=flags.draft is not None)
    eos_id = tokenizer.eos_id if tokenizer and flags.eos else None
    rows = [Continuation(tokenizer, eos_id=eos_id, stop=stops) for _ in prompts]
    is_streamed = out is None and len(prompts) == 1
    between = "\n" if flags.chat else ""
    if is_streamed and prompts[0].text is not None:
        _print(prompts[0].text + between)
    report = _Report(rows)

    def show(index: int, text: str) -> None:
        if is_streamed:
            _print(text)
        else:
            report()

    try:
        completer.complete(
            prompts, rows, sampling, max_new_tokens=flags.max_new_tokens, at_once=flags.batch_size, show=show
        )
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
    print(completer.speed, file=sys.stderr)
    return 0


class _Report:
    """Says now and then how far a batch is."""

    def __init__(self, rows: list["Continuation"]):
        self._rows, self._last, self._tokens = rows, time.monotonic(), 0

    def __call__(self) -> None:
        seconds = time.monotonic() - self._last
        if seconds < REPORT_SECONDS:
            return
        tokens = sum(len(row.ids) for row in self._rows)
        done = sum(row.finish is not None for row in self._rows)
        rate = (tokens - self._tokens) / seconds
        print(f"{done} of {len(self._rows)} prompts, {tokens} tokens, {rate:.0f} tokens/s", file=sys.stderr)
        self._last, self._tokens = time.monotonic(), tokens


def _print(text: str) -> None:
    print(text, end="", flush=True)


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
    return encode(texts, tokenizer, bos=bos, chat=flags.chat)


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
