"""Tokenizers: bytes, BPE trained on the corpus, or any Hugging Face `tokenizer.json`; BOS and EOS on request only."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from experiments.data.cache import build_once
from experiments.errors import UserError
from experiments.tokenizer_files import chat_template, read_config, special_name

if TYPE_CHECKING:
    import tokenizers

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_TRAINING_VERSION = 1  # part of the cache key: raise it when the training recipe below changes
_MAX_UTF8_BYTES = 4  # of one character


class Tokenizer:
    """A byte-level or Hugging Face tokenizer whose BOS and EOS are added only on request.

    Text is never mistaken for control: a document that spells "<|eos|>" does not get the EOS token, unless
    `special=True` (chat templates write their control tokens as text).

    add_bos: whether its files say that text begins with BOS; `encode` goes by its own argument. chat_template: jinja.
    """

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        *,
        bos: str | None,
        eos: str | None,
        pad: str | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
    ):
        raw.no_truncation()
        raw.no_padding()
        self._raw = raw
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.add_bos, self.chat_template = add_bos, chat_template
        self.bos_id, self.eos_id, self.pad_id = (self._id_of(key, name) for key, name in self._names.items())
        self.vocab_size = max(raw.get_vocab(with_added_tokens=True).values()) + 1
        content = json.loads(raw.to_str())
        self.vocabulary_sha256 = _sha256(content)  # of what ids mean, whichever of them are BOS and EOS
        self.fingerprint = _sha256([content, self._names])

    def _id_of(self, key: str, name: str | None) -> int | None:
        if name is None:
            return None
        if (token_id := self._raw.token_to_id(name)) is None:
            raise UserError(f"tokenizer: {key} {name!r} is not in its vocabulary; correct tokenizer_config.json")
        return token_id

    @property
    def special_names(self) -> dict[str, str]:
        """How BOS, EOS and padding are spelled, those that there are, by the names that chat templates know them by."""
        return {key: name for key, name in self._names.items() if name is not None}

    def added_tokens(self) -> dict[str, bool]:
        """Tokens that are found in text before it is split, and whether each is a control token, which `special` concerns."""
        return {token.content: token.special for token in self._raw.get_added_tokens_decoder().values()}

    def encode(self, text: str, bos: bool = False, eos: bool = False, *, special: bool = False) -> list[int]:
        """Token ids of `text`, with BOS in front and EOS behind where asked; UserError if the tokenizer lacks them."""
        return self.encode_batch([text], bos, eos, special=special)[0]

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False, *, special: bool = False
    ) -> list[list[int]]:
        """`encode` of many texts on all cores. Memory grows with the batch: feed a long corpus in pieces."""
        head, tail = self._wanted(bos, self.bos_id, "bos"), self._wanted(eos, self.eos_id, "eos")
        self._raw.encode_special_tokens = not special
        return [[*head, *e.ids, *tail] for e in self._raw.encode_batch_fast(texts, add_special_tokens=False)]

    @staticmethod
    def _wanted(wanted: bool, token_id: int | None, name: str) -> list[int]:
        if not wanted:
            return []
        if token_id is None:
            raise UserError(f"tokenizer: {name}=True but it has no {name} token; set {name}=False or name the token")
        return [token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out and bytes that are not UTF-8 become U+FFFD."""
        return self._raw.decode([int(i) for i in ids], skip_special_tokens=True)

    def num_bytes(self, token_id: int) -> int:
        """UTF-8 bytes of text that an ordinary token stands for; special tokens stand for none.

        Exact for byte-level tokenizers. For SentencePiece-like ones the space put before a text counts as one byte.
        """
        return self._num_bytes(token_id)

    @functools.cached_property
    def _num_bytes(self) -> Callable[[int], int]:
        from tokenizers import pre_tokenizers

        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self._raw.to_str())["decoder"])
        added = self._raw.get_added_tokens_decoder()

        def count(token_id: int) -> int:
            if token_id in added:
                return 0 if added[token_id].special else len(added[token_id].content.encode())
            token = self._raw.id_to_token(token_id) or ""  # vocabularies may have holes
            if byte_level and alphabet.issuperset(token):
                return len(token)
            if len(token) == 6 and token.startswith("<0x"):  # byte fallback
                return 1
            return len(token.replace("\u2581", " ").encode())

        return functools.cache(count)

    def save(self, directory: str | pathlib.Path, *, add_bos: bool | None = None) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`.

        `load_tokenizer` and Hugging Face both read them. add_bos: what to say of BOS instead of what was read.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._raw.to_str(pretty=True), encoding="utf-8")
        add_bos = self.add_bos if add_bos is None else add_bos
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": add_bos, **self._names}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8", newline="")

    def __getstate__(self):
        return self._raw.to_str(), self._names, self.add_bos, self.chat_template

    def __setstate__(self, state):
        import tokenizers

        raw, names, add_bos, chat_template = state
        self.__init__(
            tokenizers.Tokenizer.from_str(raw),
            bos=names["bos_token"],
            eos=names["eos_token"],
            pad=names["pad_token"],
            add_bos=add_bos,
            chat_template=chat_template,
        )


class StreamDecoder:
    """Text of a growing list of tokens, a piece at a time; a character cut between tokens waits for its last byte."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # said already, kept because some decoders treat the first token differently
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._pending.append(int(token_id))
        text = self._new_text()
        # As many tokens as a character has bytes at most: this is no unfinished character, but bytes that are no text.
        if text.endswith("\ufffd") and len(self._pending) < _MAX_UTF8_BYTES:
            return ""
        return self._say(text)

    def flush(self) -> str:
        """What is left at the end; an unfinished character shows as U+FFFD."""
        return self._say(self._new_text())

    def _new_text(self) -> str:
        said = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(said) :]

    def _say(self, text: str) -> str:
        if self._pending:
            self._context, self._pending = self._pending, []
        return text


def load_tokenizer(
    directory: str | pathlib.Path, *, bos_token: str | None = None, eos_token: str | None = None
) -> Tokenizer:
    """Reads a directory that `save` wrote, or a Hugging Face checkpoint directory (or its `tokenizer.json`).

    BOS, EOS and padding are what `tokenizer_config.json` names, none where it is silent; arguments win over the file. Text
    begins with BOS if the file says so (`add_bos_token`), or says nothing and the post-processor of `tokenizer.json` adds it.
    Raises UserError if `tokenizer.json` is missing or damaged.
    """
    import tokenizers

    path = pathlib.Path(directory).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"tokenizer: {path} does not exist; give a directory that holds tokenizer.json")
    try:
        raw = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception
        raise UserError(f"tokenizer: {path} is not a readable tokenizer.json ({error})") from error
    config_path = path.with_name("tokenizer_config.json")
    config = read_config(config_path)
    bos = bos_token or special_name(config, "bos_token", config_path)
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bos is not None and raw.encode("").tokens[:1] == [bos]
    elif not isinstance(add_bos, bool):
        raise UserError(f"tokenizer: {config_path}: add_bos_token={add_bos!r}: true or false is expected")
    return Tokenizer(
        raw,
        bos=bos,
        eos=eos_token or special_name(config, "eos_token", config_path),
        pad=special_name(config, "pad_token", config_path),
        add_bos=add_bos and bos is not None,
        chat_template=chat_template(config, config_path),
    )


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizerConfig:
    """One token per UTF-8 byte (id = byte), then BOS, EOS and padding: 259 ids."""

    def build(
        self, texts: Callable[[], Iterator[str]], corpus: str, cache_dir: pathlib.Path, say: Callable[[str], None]
    ) -> Tokenizer:
        """Needs no corpus; the arguments are those of every tokenizer config."""
        del texts, corpus, cache_dir, say
        return byte_tokenizer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BpeTokenizerConfig:
    """Byte-level BPE trained on the training documents and cached by their hash."""

    vocab_size: int = 4096  # including 256 bytes and the three special tokens; a small corpus may give fewer
    max_train_bytes: int = 200_000_000  # train on the first so many bytes of text

    def __post_init__(self):
        if self.vocab_size < 259:
            raise UserError(
                f"vocab_size={self.vocab_size}: byte-level BPE needs at least 259 (256 bytes, 3 special tokens)"
            )
        if self.max_train_bytes < 1:
            raise UserError(f"data.tokenizer.max_train_bytes={self.max_train_bytes}: must be positive")

    def build(
        self, texts: Callable[[], Iterator[str]], corpus: str, cache_dir: pathlib.Path, say: Callable[[str], None]
    ) -> Tokenizer:
        """Trains, or loads what was trained before on the same `corpus` (a hash) with the same settings."""
        settings = json.dumps([_TRAINING_VERSION, corpus, self.vocab_size, self.max_train_bytes])
        final = cache_dir / "tokenizers" / hashlib.sha256(settings.encode()).hexdigest()[:32]

        def build(directory: pathlib.Path) -> None:
            say(f"tokenizer: training BPE with {self.vocab_size} tokens")
            train_bpe(_first_bytes(texts(), self.max_train_bytes), self.vocab_size).save(directory)

        return build_once(final, build, load_tokenizer, say)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfTokenizerConfig:
    """A Hugging Face tokenizer.json, read without transformers."""

    path: str  # tokenizer.json, or the directory that holds it
    bos_token: str | None = None  # wins over tokenizer_config.json
    eos_token: str | None = None  # wins over tokenizer_config.json

    def build(
        self, texts: Callable[[], Iterator[str]], corpus: str, cache_dir: pathlib.Path, say: Callable[[str], None]
    ) -> Tokenizer:
        """Needs no corpus; the arguments are those of every tokenizer config."""
        del texts, corpus, cache_dir, say
        return load_tokenizer(self.path, bos_token=self.bos_token, eos_token=self.eos_token)


TokenizerConfig = BpeTokenizerConfig | ByteTokenizerConfig | HfTokenizerConfig


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with the GPT-2 split, so that every text round-trips."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers, trainers

    raw = Raw(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        # Sorted: `alphabet()` comes in another order in every process.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return Tokenizer(raw, bos=BOS, eos=EOS, pad=PAD)


def byte_tokenizer() -> Tokenizer:
    """Id b for byte b, then BOS, EOS and padding."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers

    raw = Raw(models.BPE(vocab={_byte_symbol(b): b for b in range(256)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    raw.add_special_tokens([BOS, EOS, PAD])
    return Tokenizer(raw, bos=BOS, eos=EOS, pad=PAD)


def _byte_symbol(byte: int) -> str:
    """The printable character that stands for a byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + sum(b not in printable for b in range(byte)))


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        if seen >= limit:
            return
        seen += len(text.encode())
        yield text
