"""Talks with a model in the terminal.

    python -m experiments.chat --checkpoint=path/to/Qwen3-0.6B --temperature=0.7 --top_p=0.95
    python -m experiments.chat --checkpoint=runs/finetuned --draft=mtp --system='Answer in one sentence.'

/help lists what can be said to the program and not to the model; Ctrl-C stops an answer, Ctrl-D or /exit leaves.
"""

import dataclasses
import sys
from typing import Literal

from experiments.cli import parse_flags, run_main
from experiments.errors import UserError
from experiments.prompts import check_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags:
    checkpoint: str  # run directory, one step of a run, or Hugging Face directory
    system: str | None = None  # instructions that stand before the conversation
    context: int | None = None  # tokens of a conversation at most; none: as many as the model knows, no more than 4096
    max_new_tokens: int | None = None  # tokens of an answer at most; none: what the context has room for
    # the MTP modules propose tokens that are verified in one step: the same text in fewer steps
    draft: Literal["mtp"] | None = None
    temperature: float = 0.7  # 0 takes the most likely token; 1 samples as trained
    top_k: int | None = None  # choose among the k most likely tokens
    top_p: float | None = None  # then among the fewest whose probabilities sum to p
    seed: int = 0  # the same seed gives the same answers to the same messages
    bos: bool | None = None  # put BOS in front; none: as in training, for a Hugging Face directory as its files say
    ema: bool = False  # use the averaged parameters of the run

    def __post_init__(self):
        for name in ("context", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least 1")
        check_seed(self.seed)


def main(argv: list[str]) -> int:
    """Reads messages from stdin until its end. Raises UserError before the weights are read for whatever is known by then."""
    flags = parse_flags(argv, ChatFlags)

    from experiments.backend import set_up_backend
    from experiments.completion import Completer, check_drafts
    from experiments.conversation import Conversation, context_of
    from experiments.loading import find_model
    from experiments.talk import Talk
    from mdl.sampling import Sampling

    source = find_model(flags.checkpoint, ema=flags.ema)
    if flags.draft:
        check_drafts(source.config, flags.checkpoint)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UserError(f"--checkpoint={flags.checkpoint}: holds no tokenizer.json; without one there is no text")
    try:
        sampling = Sampling(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p)
        context = context_of(source.config, flags.context)
    except ValueError as error:
        raise UserError(str(error)) from error
    bos = source.begins_with_bos(tokenizer) if flags.bos is None else flags.bos
    conversation = Conversation(tokenizer, context=context, system=flags.system, bos=bos)
    conversation.check()

    set_up_backend()
    completer = Completer(source.load(), drafts=flags.draft is not None)
    talk = Talk(completer, conversation, sampling, seed=flags.seed, max_new_tokens=flags.max_new_tokens)
    talk.until_the_end()
    if completer.speed.calls:
        print(completer.speed, file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
