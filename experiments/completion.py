"""A loaded model at work: prompts in, text out as it comes, and how fast it came."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax

from experiments.continuation import Continuation
from experiments.errors import UserError
from experiments.loading import LoadedModel
from experiments.prompts import Prompt
from experiments.scoring import exact_float32
from mdl.generate import Acceptance, Generator, depth_of
from mdl.sampling import Sampling
from mdl.transformer import TransformerConfig


def check_drafts(config: TransformerConfig, checkpoint: str) -> None:
    """UserError for --draft=mtp with a model that has nothing to draft with."""
    try:
        depth_of(config)
    except ValueError as error:
        raise UserError(f"--draft=mtp: {checkpoint}: {error}; leave the flag out") from error


@dataclasses.dataclass
class Speed:
    """Of one or several calls; the first token of each waits for compilation and for the prompt, and is not in the rate."""

    acceptance: Acceptance
    tokens: int = 0
    calls: int = 0
    first_seconds: float = 0.0  # until the first token of the last call
    later_seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        later = self.tokens - self.calls
        return later / self.later_seconds if later and self.later_seconds else None

    def __str__(self) -> str:
        line = f"{self.tokens} tokens; the first after {self.first_seconds:.1f} s"
        if self.rate is not None:
            line += f", then {self.rate:.1f} tokens/s"
        if shares := self.acceptance.shares:
            right = ", ".join(f"{100 * share:.0f} %" for share in shares)
            line += f"; of the drafts {right} were right, {1 + sum(shares):.2f} tokens a step"
        return line


class Completer:
    """Continues prompts; what was compiled for one call serves the next."""

    def __init__(self, model: LoadedModel, *, drafts: bool):
        self._model = model
        with jax.set_mesh(model.mesh):
            self._generator = Generator(model.pure, model.arrays, drafts=drafts)
        self.speed = Speed(self._generator.acceptance)

    def complete(
        self,
        prompts: Sequence[Prompt],
        rows: Sequence[Continuation],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        at_once: int | None = None,
        show: Callable[[int, str], None],
    ) -> None:
        """Fills the row of each prompt, `at_once` of them at a time, and ends it.

        show(index, text) is called for each token, with what can be shown now that it is there: some of it waits for more. Without
        a tokenizer that is the token's number.
        """
        started = time.monotonic()
        first = None
        with jax.set_mesh(self._model.mesh), exact_float32(self._model):
            stream = self._generator.stream(
                [prompt.ids for prompt in prompts],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seeds=[prompt.seed for prompt in prompts],
                rows=at_once,
                ended=lambda index: rows[index].finish is not None,
            )
            try:
                for index, tokens in stream:
                    if first is None:
                        first = time.monotonic()
                        self.speed.calls, self.speed.first_seconds = self.speed.calls + 1, first - started
                    row = rows[index]
                    for token in tokens:
                        if row.finish:
                            break
                        self.speed.tokens += 1
                        text = row.push(token) if self._model.tokenizer else f"{token} "
                        show(index, text + (row.end() if len(row.ids) == max_new_tokens else ""))
            finally:
                if first is not None:
                    self.speed.later_seconds += time.monotonic() - first
