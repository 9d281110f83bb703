"""The token cache: reused, rebuilt when damaged, and safe when several processes want it at once."""

import multiprocessing
import pathlib

import numpy as np
import pytest

from experiments.data.cache import build_once, default_cache_dir
from experiments.data.documents import Document
from experiments.data.token_cache import tokenize_corpus
from experiments.errors import UserError
from experiments.tokenizer import byte_tokenizer, train_bpe


def tokenize(texts, cache_dir, *, tokenizer=None, identity="corpus", bos=False, eos=True, said=None):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    return tokenize_corpus(
        {"train": lambda: iter(documents[1:]), "validation": lambda: iter(documents[:1])},
        identity,
        tokenizer or byte_tokenizer(),
        bos=bos,
        eos=eos,
        cache_dir=cache_dir,
        say=(said if said is not None else []).append,
    )


def test_documents_come_back(tmp_path, texts):
    tokenizer = byte_tokenizer()
    train = tokenize(texts, tmp_path, bos=True).splits["train"]
    assert train.tokens.dtype == np.uint16
    pieces = np.split(train.tokens, train.offsets[1:-1])
    assert [p.tolist() for p in pieces] == [tokenizer.encode(text, bos=True, eos=True) for text in texts[1:]]
    assert train.predicted_bytes == sum(len(text.encode()) for text in texts[1:])


def test_without_bos_first_tokens_do_not_count(tmp_path, texts):
    tokenizer = train_bpe([*texts, *texts], 400)
    train = tokenize(texts, tmp_path, tokenizer=tokenizer).splits["train"]
    firsts = sum(len(tokenizer.decode(tokenizer.encode(text)[:1]).encode()) for text in texts[1:])
    assert firsts >= len(texts) - 1
    assert train.predicted_bytes == sum(len(text.encode()) for text in texts[1:]) - firsts


def test_empty_documents_are_left_out(tmp_path):
    train = tokenize(["held out", "", "a", "", "b", ""], tmp_path).splits["train"]
    assert train.offsets.tolist() == [0, 2, 4]


def test_a_second_run_reads_nothing(tmp_path, texts):
    said = []
    first = tokenize(texts, tmp_path, said=said)
    assert len(said) == 1 and "tokenized" in said[0]
    again = tokenize(["never", "read"], tmp_path, said=said)  # the identity, not the text, is the key
    assert len(said) == 1
    assert again.sha256 == first.sha256
    np.testing.assert_array_equal(again.splits["train"].tokens, first.splits["train"].tokens)


def test_key_covers_corpus_tokenizer_and_policy(tmp_path, texts):
    said = []
    tokenize(texts, tmp_path, said=said)
    tokenize(texts, tmp_path, said=said, identity="other")
    tokenize(texts, tmp_path, said=said, tokenizer=train_bpe(texts, 300))
    tokenize(texts, tmp_path, said=said, bos=True)
    tokenize(texts, tmp_path, said=said, eos=False)
    assert len(said) == 5


def damage_tokens(directory):
    path = directory / "train/tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])


def damage_offsets(directory):
    path = directory / "train/offsets.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def damage_meta(directory):
    (directory / "meta.json").write_text("{")


def lose_a_file(directory):
    (directory / "validation/tokens.bin").unlink()


@pytest.mark.parametrize("damage", [damage_tokens, damage_offsets, damage_meta, lose_a_file])
def test_damage_is_noticed_said_and_repaired(damage, tmp_path, texts):
    said = []
    tokens = np.array(tokenize(texts, tmp_path, said=said).splits["train"].tokens)
    (directory,) = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    damage(directory)
    repaired = tokenize(texts, tmp_path, said=said)
    assert "damaged" in said[1] and "tokenized" in said[2]
    np.testing.assert_array_equal(repaired.splits["train"].tokens, tokens)


def test_a_failed_build_leaves_nothing(tmp_path):
    def broken():
        yield Document("a", "fine")
        raise UserError("a.jsonl:2: corrupt")

    with pytest.raises(UserError, match="corrupt"):
        tokenize_corpus(
            {"train": broken}, "x", byte_tokenizer(), bos=False, eos=True, cache_dir=tmp_path, say=lambda _: None
        )
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    left_over = tmp_path / "thing.tmp-killed"
    left_over.mkdir()
    build_once(tmp_path / "thing", lambda d: (d / "x").touch() and None, lambda d: d, print)
    assert not left_over.exists() and (tmp_path / "thing/x").exists()


def _build_slowly(directory, log, barrier):
    def build(scratch):
        with open(log, "a") as file:
            file.write("built\n")
        for number in range(200):
            (scratch / f"{number}").write_text("x" * 1000)

    barrier.wait()
    build_once(pathlib.Path(directory), build, lambda d: [(d / f"{n}").read_text() for n in range(200)], print)


def test_processes_at_once_build_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    arguments = (str(tmp_path / "thing"), str(tmp_path / "log"), barrier)
    processes = [context.Process(target=_build_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_without_locks_the_first_rename_wins(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    final, other = tmp_path / "thing", tmp_path / "thing.tmp-alive"
    other.mkdir()  # of another process, which may be alive: it must stay

    def build(scratch):
        (scratch / "x").write_text("ours")
        final.mkdir()
        (final / "x").write_text("theirs")

    assert build_once(final, build, lambda d: (d / "x").read_text(), print) == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing", "thing.lock", "thing.tmp-alive"]


def test_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*set another directory"):
        tokenize(["a", "b"], tmp_path / "file")


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "mdl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache/mdl"
