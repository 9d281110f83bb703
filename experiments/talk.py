"""The loop of `experiments.chat`: lines from stdin are messages, or commands that begin with a slash."""

import contextlib
import dataclasses
import sys

from experiments.completion import Completer
from experiments.continuation import Continuation
from experiments.conversation import Conversation
from experiments.errors import UserError
from experiments.prompts import Prompt
from mdl.sampling import Sampling

HELP = """\
/clear         forget the conversation
/system TEXT   what the model is told before the conversation, from now on; without a text nothing
/temp NUMBER   temperature; 0 takes the most likely token
/exit          leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Talk:
    def __init__(
        self,
        completer: Completer,
        conversation: Conversation,
        sampling: Sampling,
        *,
        seed: int,
        max_new_tokens: int | None,
    ):
        self._completer, self._conversation, self._sampling = completer, conversation, sampling
        self._seed, self._max_new_tokens = seed, max_new_tokens
        self._commands = {"/clear": self._clear, "/system": self._system, "/temp": self._temp, "/help": self._help}

    def until_the_end(self) -> None:
        """Of stdin, or until /exit."""
        _edit_lines()
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)")
                continue
            if line == "/exit":
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line:
                    self._answer(line)
            except UserError as error:
                print(f"({error})")
            except KeyboardInterrupt:  # while the template or the first token was being waited for
                print("\n(stopped)")

    def _answer(self, text: str) -> None:
        conversation = self._conversation
        ready = conversation.asked(text)
        if ready.left_out:
            print(f"(the context of {conversation.context} tokens is full: {ready.left_out} old messages are left out)")
        tokenizer, room = conversation.tokenizer, conversation.context - len(ready.ids)
        row = Continuation(tokenizer, eos_id=tokenizer.eos_id, stop=conversation.stop)
        note = f"the answer is cut: {self._why_cut(room)}"
        try:
            self._completer.complete(
                [Prompt(text, ready.ids, self._seed)],
                [row],
                self._sampling,
                max_new_tokens=min(self._max_new_tokens or room, room),
                show=lambda index, text: print(text, end="", flush=True),
            )
        except KeyboardInterrupt:
            print(row.end(), end="")
            note = "stopped"
        print(f"\n({note})" if row.finish == "length" else "")
        conversation.answered(row.text.strip())

    def _why_cut(self, room: int) -> str:
        if self._max_new_tokens is not None and self._max_new_tokens <= room:
            return f"--max_new_tokens={self._max_new_tokens}"
        return f"the context of {self._conversation.context} tokens is full"

    def _command(self, name: str, argument: str = "") -> None:
        if name not in self._commands:
            raise UserError(f"no command {name}; there are {', '.join(self._commands)}, /exit")
        self._commands[name](argument)

    def _clear(self, argument: str) -> None:
        del argument
        self._conversation.clear()
        print("(the conversation is forgotten)")

    def _system(self, argument: str) -> None:
        self._conversation.system = argument or None
        print("(the system's message is set)" if argument else "(there is no system message)")

    def _temp(self, argument: str) -> None:
        try:
            self._sampling = dataclasses.replace(self._sampling, temperature=float(argument))
        except ValueError as error:
            raise UserError(f"/temp {argument}: a number that is not negative is expected") from error
        print(f"(temperature {self._sampling.temperature:g})")

    def _help(self, argument: str) -> None:
        del argument
        print(HELP)


def _edit_lines() -> None:
    """Arrow keys and history for `input`, where Python has them."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # importing it is all
