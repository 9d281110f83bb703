"""Tokenizers: exact round trips, explicit BOS and EOS, stable fingerprints, saved and streamed."""

import json
import pickle
import subprocess
import sys

import pytest

from experiments.errors import UserError
from experiments.tokenizer import (
    BOS,
    BpeTokenizerConfig,
    ByteTokenizerConfig,
    HfTokenizerConfig,
    StreamDecoder,
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_bpe,
)

CORPUS = ["def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n", "naïve café 日本語 🙂 " * 20] * 5
TEXTS = [
    "",
    " ",
    "plain words",
    "\n\n\tif x:\r\n        return {'a': 1}\n",
    "naïve café, ﬁ, Å (A + ring), 日本語, 🙂👩‍👩‍👧, \u0000 \u2028 \ufffd",
    "<|bos|>text that spells <|eos|> and <|pad|>",
    "x" * 5000,
]


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request):
    return byte_tokenizer() if request.param == "byte" else train_bpe(CORPUS, 300)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    assert sum(map(tokenizer.num_bytes, ids)) == len(text.encode())


def test_bos_and_eos_are_explicit(tokenizer):
    plain = tokenizer.encode("abc")
    assert tokenizer.encode("abc", bos=True, eos=True) == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.encode("abc", bos=True)[0] == tokenizer.bos_id
    assert tokenizer.decode(tokenizer.encode("abc", bos=True, eos=True)) == "abc"
    assert tokenizer.num_bytes(tokenizer.eos_id) == 0


def test_control_tokens_in_text_count_only_on_request(tokenizer):
    assert tokenizer.eos_id in tokenizer.encode("a<|eos|>b", special=True)
    assert tokenizer.eos_id not in tokenizer.encode("a<|eos|>b")


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS, eos=True) == [tokenizer.encode(text, eos=True) for text in TEXTS]


def test_byte_ids_are_bytes():
    assert byte_tokenizer().encode("aé\n") == list("aé\n".encode())
    assert byte_tokenizer().vocab_size == 259


def test_save_and_pickle_keep_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert (copy.bos_id, copy.eos_id, copy.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert copy.encode(TEXTS[4]) == tokenizer.encode(TEXTS[4])


def test_what_stands_beside_the_tokenizer_is_kept_too(tmp_path):
    saved = Tokenizer(byte_tokenizer()._raw, bos=BOS, eos=None, add_bos=True, chat_template="{{ bos_token }}\r\né ")
    saved.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(saved))):
        assert (copy.add_bos, copy.chat_template) == (True, "{{ bos_token }}\r\né ")
        assert copy.fingerprint == saved.fingerprint
    saved.save(tmp_path, add_bos=False)
    assert load_tokenizer(tmp_path).add_bos is False
    assert saved.special_names == {"bos_token": BOS}
    assert saved.added_tokens() == {"<|bos|>": True, "<|eos|>": True, "<|pad|>": True}


@pytest.mark.parametrize(
    ("field", "template"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}], "one"),
        ([{"name": "rag", "template": "one"}, {"name": "tool_use", "template": "two"}], "one"),
        ([], None),
        (None, None),
    ],
)
def test_chat_template_of_tokenizer_config(field, template, tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": field}))
    assert load_tokenizer(tmp_path).chat_template == template
    (tmp_path / "chat_template.jinja").write_text("file")  # wins
    assert load_tokenizer(tmp_path).chat_template == "file"


@pytest.mark.parametrize(
    ("config", "adds"),
    [
        ({"add_bos_token": True, "bos_token": {"content": "<｜begin▁of▁sentence｜>"}}, True),
        ({"bos_token": "<｜begin▁of▁sentence｜>"}, True),  # the post-processor puts it there
        ({"add_bos_token": False, "bos_token": "<｜begin▁of▁sentence｜>"}, False),
        ({"bos_token": "<|pad|>"}, False),  # named, but nothing puts it in front of text
        ({"add_bos_token": True, "bos_token": None}, False),
        ({}, False),
    ],
)
def test_whether_text_begins_with_bos(config, adds, tmp_path):
    save_like_deepseek(tmp_path, config=config)
    assert load_tokenizer(tmp_path).add_bos is adds


def test_fingerprint_sees_the_vocabulary_and_the_special_tokens(tmp_path):
    byte_tokenizer().save(tmp_path)
    other_eos = load_tokenizer(tmp_path, eos_token="<|pad|>")
    prints = {byte_tokenizer().fingerprint, train_bpe(CORPUS, 300).fingerprint, train_bpe(CORPUS, 301).fingerprint}
    assert len(prints | {other_eos.fingerprint}) == 4
    assert other_eos.vocabulary_sha256 == byte_tokenizer().vocabulary_sha256 != train_bpe(CORPUS, 300).vocabulary_sha256


def test_training_gives_the_same_vocabulary_in_another_process():
    code = f"from experiments.tokenizer import train_bpe; print(train_bpe({CORPUS!r}, 300).fingerprint)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == train_bpe(CORPUS, 300).fingerprint


@pytest.mark.parametrize("text", TEXTS)
def test_stream_decoder_says_the_whole_text_in_whole_characters(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode(text, eos=True)] + [decoder.flush()]
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_decoder_does_not_wait_for_ever_on_bytes_that_are_no_text():
    decoder = StreamDecoder(byte_tokenizer())
    said = "".join(decoder.push(0x80) for _ in range(12))
    assert set(said) == {"\ufffd"}
    assert decoder.push(ord("a")).endswith("a")
    decoder.push(0xC3)
    assert decoder.flush() == "\ufffd"


def save_like_deepseek(directory, *, config):
    """A byte-level tokenizer.json with full-width special tokens, truncation and a post-processor that adds BOS."""
    train_bpe(CORPUS, 300).save(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("<|bos|>", "<｜begin▁of▁sentence｜>")
    content["model"]["vocab"]["<｜begin▁of▁sentence｜>"] = content["model"]["vocab"].pop("<|bos|>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<｜begin▁of▁sentence｜>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<｜begin▁of▁sentence｜>": {"id": "b", "ids": [0], "tokens": ["<｜begin▁of▁sentence｜>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_hugging_face_directory(tmp_path):
    bos = {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>", "special": True}
    save_like_deepseek(tmp_path, config={"add_bos_token": True, "bos_token": bos, "eos_token": "<|eos|>"})
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = HfTokenizerConfig(path=str(path)).build(lambda: iter(()), "", tmp_path, print)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
        assert tokenizer.decode(tokenizer.encode("café au lait")) == "café au lait"
        assert tokenizer.encode("café", bos=True) == [0, *tokenizer.encode("café")]
        assert 0 not in tokenizer.encode("café")


def test_hugging_face_tokenizer_without_config_has_no_bos_or_eos(tmp_path):
    train_bpe(CORPUS, 300).save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and tokenizer.eos_id is None
    with pytest.raises(UserError, match="no bos token"):
        tokenizer.encode("a", bos=True)
    assert load_tokenizer(tmp_path, eos_token="<|eos|>").eos_id == 1


def save_like_llama(directory):
    """A SentencePiece-like tokenizer.json: spaces as U+2581, one put in front, bytes for what it does not know."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdehlowr"]
    vocab = {token: number for number, token in enumerate([*tokens, "\u2581h", "lo"])}
    raw = tokenizers.Tokenizer(models.BPE(vocab, [("\u2581", "h"), ("l", "o")], byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(parts)
    raw.add_special_tokens(["<s>", "</s>"])
    raw.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')


@pytest.mark.parametrize("text", ["hello world", "hello  é日 🙂 low", "  a", "x"])
def test_sentencepiece_like_tokenizer(text, tmp_path):
    save_like_llama(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(ids) == text
    assert sum(map(tokenizer.num_bytes, ids)) == len(text.encode()) + 1  # the space that was put in front
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join([*pieces, decoder.flush()]) == text
    assert not any("\ufffd" in piece for piece in pieces)


BAD_CONFIGS = {
    "{": "not a JSON object",
    '{"bos_token": 1}': "bos_token=1: a text is expected",
    '{"eos_token": {"text": "</s>"}}': "eos_token={'text': '</s>'}: a text is expected",
    '{"add_bos_token": "yes"}': "add_bos_token='yes': true or false is expected",
    '{"chat_template": 1}': "chat_template: a text, or a list of texts with names, is expected",
    '{"chat_template": [1]}': "chat_template: a text, or a list of texts with names, is expected",
}


def test_bad_tokenizer_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_tokenizer(tmp_path)
    for content, message in BAD_CONFIGS.items():
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(UserError, match=r"eos_token '<nope>' is not in its vocabulary"):
        load_tokenizer(tmp_path)


def test_trained_bpe_is_cached_by_corpus_and_settings(tmp_path):
    said = []

    def build(vocab_size, corpus):
        config = BpeTokenizerConfig(vocab_size=vocab_size)
        return config.build(lambda: iter(CORPUS), corpus, tmp_path, said.append)

    first = build(300, "corpus")
    assert len(said) == 1 and "training BPE" in said[0]
    assert build(300, "corpus").fingerprint == first.fingerprint
    assert len(said) == 1
    build(280, "corpus")
    build(300, "other corpus")
    assert len(said) == 3


def test_bpe_trains_on_the_first_bytes_only(tmp_path):
    config = BpeTokenizerConfig(vocab_size=400, max_train_bytes=1)
    trained = config.build(lambda: iter(["aaaa bbbb", "cccc" * 50]), "corpus", tmp_path, print)
    assert len(trained.encode("cccc")) == 4
    assert len(trained.encode("aaaa")) < 4


def test_bad_settings():
    with pytest.raises(UserError, match="vocab_size=100"):
        BpeTokenizerConfig(vocab_size=100)
    with pytest.raises(UserError, match="max_train_bytes=0"):
        BpeTokenizerConfig(max_train_bytes=0)


def test_byte_config(tmp_path):
    built = ByteTokenizerConfig().build(lambda: iter(()), "", tmp_path, print)
    assert built.fingerprint == byte_tokenizer().fingerprint
