"""Conversations to tokens, by the jinja template that comes with a tokenizer."""

import collections
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.errors import UserError
from experiments.tokenizer import Tokenizer

Message = Mapping[str, Any]  # JSON types: "role", "content" and what else the template reads

_SANDBOX = pathlib.Path(__file__).with_name("chat_sandbox.py")
_TIMEOUT_SECONDS = 60  # for starting the process, too, on a machine that is busy; its own limit is on processor time
_PRIVATE_USE = range(0xE000, 0xF900)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A jinja template. It is rendered in a sandbox, in a process of its own with bounds on time, memory and output."""

    source: str

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation; `variables` are what else the template may read (bos_token, eos_token, ...).

        UserError, one line, for a template that fails, refuses the conversation or takes too long.
        """
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UserError(f'chat: message {number}: an object with the text "role" is expected')
        variables |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        request = json.dumps({"template": self.source, "variables": variables})
        try:
            # -P: the directory of the file is not where its imports are looked for.
            done = subprocess.run(
                [sys.executable, "-P", str(_SANDBOX)],
                input=request.encode(),
                capture_output=True,
                timeout=_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"chat template: does not end within {_TIMEOUT_SECONDS} s") from None
        if done.returncode < 0:
            raise UserError(
                f"chat template: was stopped by signal {-done.returncode}; it takes too long or too much memory"
            )
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"chat template: its process ended with code {done.returncode} ({last[0]})")
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise UserError(f"chat template: {' '.join(answer['error'].split())}")
        return answer["text"]


# For tokenizers that bring none: the plain form of DeepSeek-V2's chat, which base models continue well too.
PLAIN = ChatTemplate(
    r"""{% for message in messages %}
{% if message.role == 'user' %}
{{ 'User: ' + message.content + '\n\n' }}
{%- elif message.role == 'assistant' %}
{{ 'Assistant: ' + message.content + (eos_token or '\n\n') }}
{%- elif message.role == 'system' %}
{{ message.content + '\n\n' }}
{%- else %}
{{ raise_exception('the plain template knows the roles system, user and assistant, not ' + message.role) }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ 'Assistant:' }}
{%- endif %}"""
)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    bos: bool,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[int]:
    """Token ids of a conversation, by the tokenizer's own template or PLAIN.

    bos: put BOS in front, unless the template has done so. Control tokens come from the template alone: where a message or a
    tool spells one it is text. Of tokens that are not marked special (<think>) that holds for messages of users and tools, for
    those that the template spells. Conversations that spell none give the ids of the whole rendered text.
    """
    template = PLAIN if tokenizer.chat_template is None else ChatTemplate(tokenizer.chat_template)
    shield = _Shield(tokenizer, template, json.dumps([messages, tools, template.source], ensure_ascii=False))
    text = template.render(
        [shield.message(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        tools=tools and [shield.cover(tool) for tool in tools],
        **(tokenizer.special_names | variables),
    )
    ids = shield.encode(text)
    return [*tokenizer.encode("", bos=True), *ids] if bos and ids[:1] != [tokenizer.bos_id] else ids


class _Shield:
    """Carries control tokens that messages spell through the template as single characters that nothing else uses."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, everything: str):
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens()
        special = [token for token, is_special in self._added.items() if is_special]
        self._special = _any_of(special)
        self._control = _any_of([*special, *(token for token in self._added if token in template.source)])
        unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in everything)
        self._marks: dict[str, str] = collections.defaultdict(lambda: next(unused))

    def message(self, message: Message) -> Any:
        return self.cover(message, self._control if message.get("role") in ("user", "tool") else self._special)

    def cover(self, value: Any, tokens: re.Pattern | None = None) -> Any:
        """The JSON value with marks in place of tokens, by default the special ones."""
        tokens = self._special if tokens is None else tokens
        if isinstance(value, str):
            return tokens.sub(lambda match: self._marks[match[0]], value)
        if isinstance(value, Mapping):
            return {self.cover(key, tokens): self.cover(item, tokens) for key, item in value.items()}
        return [self.cover(item, tokens) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str) -> list[int]:
        """Ids of the rendered text: control tokens where the template wrote them, text where there are marks."""
        tokens = {mark: token for token, mark in self._marks.items()}
        pieces = re.split(f"([{''.join(tokens)}])", text) if tokens else [text]
        ids: list[int] = []
        for piece in pieces:
            ids += self._as_text(tokens[piece]) if piece in tokens else self._tokenizer.encode(piece, special=True)
        return ids

    def _as_text(self, token: str) -> list[int]:
        if self._added[token]:
            return self._tokenizer.encode(token)
        return self._tokenizer.encode(token[:1]) + self._tokenizer.encode(
            token[1:]
        )  # whole, it would be found all the same


def _any_of(tokens: Sequence[str]) -> re.Pattern:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
