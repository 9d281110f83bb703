"""A conversation as a chat template sees it, kept within the context of the model."""

import dataclasses

from experiments.chat_template import Message, encode_chat
from experiments.errors import UserError
from experiments.tokenizer import Tokenizer
from mdl.transformer import TransformerConfig

DEFAULT_CONTEXT = 4096  # where the model knows more: its cache takes memory for all of it
PLAIN_STOP = "\n\nUser:"  # by the template of tokenizers without one, what a model writes that goes on by itself


def context_of(config: TransformerConfig, wanted: int | None) -> int:
    """Tokens of a conversation, the answer included; ValueError if the model does not know so many."""
    limit = config.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ValueError(f"--context={wanted}: max_position_embeddings of the model is {limit}")
    return min(DEFAULT_CONTEXT, limit) if wanted is None else wanted


@dataclasses.dataclass(frozen=True)
class Ready:
    """What the model is to continue."""

    ids: list[int]
    left_out: int  # messages at the beginning that found no room


class Conversation:
    """Messages of user and assistant in turn, behind what the system says."""

    def __init__(self, tokenizer: Tokenizer, *, context: int, system: str | None, bos: bool):
        self.tokenizer, self.context, self.system = tokenizer, context, system
        self._bos = bos
        self._messages: list[Message] = []

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer, besides EOS."""
        return (PLAIN_STOP,) if self.tokenizer.chat_template is None else ()

    def clear(self) -> None:
        self._messages.clear()

    def check(self) -> None:
        """UserError for a template, a system message or a context with which no conversation can begin."""
        self.asked("hi")
        self._messages.pop()

    def asked(self, text: str) -> Ready:
        """Adds a message of the user. The oldest messages are left out, two at a time, until a quarter of the context is free.

        UserError if the template refuses the message, or if it finds no room by itself; it is not added then.
        """
        messages: list[Message] = [*self._messages, {"role": "user", "content": text}]
        first = 0
        while len(ids := self._encode(messages[first:])) > self.context - max(self.context // 4, 1):
            if first + 2 >= len(messages):
                if len(ids) < self.context:
                    break
                raise UserError(
                    f"the message takes {len(ids)} tokens with what stands before it; the context has {self.context}"
                )
            first += 2
        self._messages = messages[first:]
        return Ready(ids, first)

    def answered(self, text: str) -> None:
        self._messages.append({"role": "assistant", "content": text})

    def _encode(self, messages: list[Message]) -> list[int]:
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return encode_chat(self.tokenizer, [*system, *messages], bos=self._bos)
