"""The text of one row of a batch while its tokens arrive: where it ends, and what may be shown already."""

from collections.abc import Sequence
from typing import Literal

from experiments.tokenizer import StreamDecoder, Tokenizer

Finish = Literal["eos", "stop", "length"]


class Continuation:
    """Collects tokens until EOS or a stop string. Without a tokenizer there are ids and no text."""

    def __init__(self, tokenizer: Tokenizer | None, *, eos_id: int | None = None, stop: Sequence[str] = ()):
        self.ids: list[int] = []  # EOS and the tokens of a stop string included
        self.text = ""  # neither included
        self.finish: Finish | None = None
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._eos_id, self._stop = eos_id, tuple(stop)
        self._held = ""  # may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """The text that can be shown now that this token is there. Tokens behind the end are ignored."""
        if self.finish:
            return ""
        self.ids.append(int(token_id))
        if token_id == self._eos_id:
            return self._end("eos")
        return self._show(self._decoder.push(token_id) if self._decoder else "")

    def end(self) -> str:
        """No more tokens will come; the text that was held back until now."""
        return "" if self.finish else self._end("length")

    def _end(self, finish: Finish) -> str:
        shown = self._show(self._decoder.flush() if self._decoder else "")
        if self.finish:  # what the decoder still had completed a stop string
            return shown
        self.finish = finish
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def _show(self, piece: str) -> str:
        text = self._held + piece
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.finish = "stop"
            text, self._held = text[: min(found)], ""
        else:
            text, self._held = _split_at_beginning(text, self._stop)
        self.text += text
        return text


def _split_at_beginning(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """`text` in two: the second part is the longest end of it with which a stop string begins."""
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(len(text) - longest, 0), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:]
    return text, ""
