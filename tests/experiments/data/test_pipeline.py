"""The cached pipeline: one integer of state, the same rows for any number of processes and any batch split."""

import dataclasses
import gzip
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from experiments.data.files import JsonlConfig, TextFilesConfig
from experiments.data.pipeline import DataConfig
from experiments.data.sources import MixtureConfig
from experiments.errors import UserError
from experiments.tokenizer import BpeTokenizerConfig, ByteTokenizerConfig, HfTokenizerConfig, byte_tokenizer

SEQ_LEN = 32


@pytest.fixture
def config(text_files, tmp_path):
    return DataConfig(
        source=TextFilesConfig(paths=(text_files,), validation_fraction=0.2),
        tokenizer=ByteTokenizerConfig(),
        cache_dir=str(tmp_path / "cache"),
    )


def build(config, seed=0, **processes):
    return config.build(SEQ_LEN, seed, say=lambda _: None, **processes)


def read(data, counts, start=0):
    """Batches of the given sizes, as one list."""
    stream = data.train_stream(start)
    try:
        return [stream.next_rows(count) for count in counts]
    finally:
        stream.close()


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs) == {"tokens", "segment_ids", "positions"}
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_rows_have_the_shape_of_the_contract(config):
    data = build(config)
    batch = read(data, [6])[0]
    for array in batch.values():
        assert array.shape == (6, SEQ_LEN + 1) and array.dtype == np.int32
    assert batch["segment_ids"].min() == 1
    starts = np.diff(batch["segment_ids"], axis=1, prepend=0) != 0
    assert ((batch["positions"] == 0) == starts).all()


def test_one_epoch_is_every_row_once_and_the_next_is_in_another_order(config):
    data = build(config)
    count = data.num_train_rows
    assert count > 20
    assert data.tokens_per_epoch // SEQ_LEN == count
    first, second = (rows["tokens"].tolist() for rows in read(data, [count, count]))
    assert sorted(first) == sorted(second)
    assert first != second
    stored = [row["tokens"].tolist() for row in data._train_windows[0]]
    assert sorted(first) == sorted(stored) and first != stored


def test_same_seed_same_rows_and_another_seed_other_rows(config):
    first, again, other = (read(build(config, seed), [12])[0] for seed in (0, 0, 1))
    assert_equal(first, again)
    assert (first["tokens"] != other["tokens"]).any()


def test_resume_from_every_index(config):
    data = build(config)
    whole = read(data, [60])[0]
    for start in range(57):
        assert_equal(read(data, [3], start)[0], {name: rows[start : start + 3] for name, rows in whole.items()})


def test_state_is_the_index_and_json(config):
    data = build(config)
    stream = data.train_stream(5)
    try:
        for expected in (5, 9, 13):
            assert stream.index == expected
            assert json.loads(json.dumps(stream.state)) == {"index": expected}
            batch = stream.next_rows(4)
    finally:
        stream.close()
    assert_equal(read(data, [4], {"index": 13})[0], batch)


def test_a_closed_stream_can_be_read_on(config):
    data = build(config)
    stream = data.train_stream()
    batches = []
    for _ in range(3):
        batches.append(stream.next_rows(4))
        stream.close()
    assert_equal(joined(batches), read(data, [12])[0])


def test_batch_sizes_may_change_at_any_time(config):
    data = build(config)
    assert_equal(joined(read(data, [4, 4, 8, 1, 3, 8, 8])), read(data, [36])[0])


def test_processes_together_hold_the_rows_of_one(config):
    one = build(config)
    four = [build(config, process_index=p, process_count=4) for p in range(4)]
    whole = read(one, [8, 8, 4], 3)
    parts = [read(data, [8, 8, 4], 3) for data in four]
    for step in range(3):
        assert_equal(joined([part[step] for part in parts]), whole[step])


def test_resume_with_another_process_count(config):
    two = [build(config, process_index=p, process_count=2) for p in range(2)]
    for data in two:
        stream = data.train_stream()
        stream.next_rows(6)
        stream.next_rows(6)
        state = stream.state
        stream.close()
    rest = read(build(config), [12], state)[0]
    assert_equal(rest, {name: rows[12:] for name, rows in read(build(config), [24])[0].items()})


def test_rows_that_do_not_divide_are_refused(config):
    data = build(config, process_index=0, process_count=4)
    stream = data.train_stream()
    for count in (6, 0):
        with pytest.raises(UserError, match=f"{count} rows do not divide among 4 processes"):
            stream.next_rows(count)
    stream.close()


@pytest.fixture
def mixture(tmp_path):
    """Members whose texts can be told apart by their letters; one is far smaller than the other."""
    members = []
    for letter, count in (("a", 40), ("b", 400)):
        path = tmp_path / f"{letter}.jsonl"
        path.write_text("".join(json.dumps({"text": letter * (20 + i % 30)}) + "\n" for i in range(count)))
        members.append(JsonlConfig(paths=(str(path),), validation_fraction=0.1))
    return DataConfig(
        source=MixtureConfig(members=tuple(members), weights=(3.0, 1.0)),
        tokenizer=ByteTokenizerConfig(),
        cache_dir=str(tmp_path / "cache"),
    )


def share_of(batch, letter):
    return (batch["tokens"] == ord(letter)).any(axis=1).mean()


def test_mixture_keeps_its_weights_through_the_small_members_epochs(mixture):
    data = build(mixture)
    sizes = [len(windows) for windows in data._train_windows]
    assert sizes[1] > 5 * sizes[0]
    batches = read(data, [100] * 10)
    for batch in batches:
        assert abs(share_of(batch, "a") - 0.75) <= 0.02
        assert abs(share_of(batch, "b") - 0.25) <= 0.02


def test_mixture_resumes_from_every_index_and_across_processes(mixture):
    data = build(mixture)
    whole = read(data, [50])[0]
    for start in range(0, 46, 5):
        assert_equal(read(data, [4], start)[0], {name: rows[start : start + 4] for name, rows in whole.items()})
    parts = [read(build(mixture, process_index=p, process_count=2), [10], 7)[0] for p in range(2)]
    assert_equal(joined(parts), {name: rows[7:17] for name, rows in whole.items()})


def test_mixture_validates_on_every_member(mixture):
    rows = list(build(mixture).validation_rows())
    assert any((row["tokens"] == ord("a")).any() for row in rows)
    assert any((row["tokens"] == ord("b")).any() for row in rows)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("tokenizer", [ByteTokenizerConfig(), BpeTokenizerConfig(vocab_size=320)])
def test_validation_bytes_are_those_that_the_targets_decode_to(config, texts, bos, tokenizer):
    data = build(dataclasses.replace(config, bos=bos, tokenizer=tokenizer))
    predicted = []
    for row in data.validation_rows():
        segments = row["segment_ids"]
        counts = (segments[1:] == segments[:-1]) & (segments[1:] != 0)
        predicted += row["tokens"][1:][counts].tolist()
    assert sum(map(data.tokenizer.num_bytes, predicted)) == data.validation_bytes
    held_out = list(data.validation_texts())
    assert set(held_out) < set(texts)
    total = sum(len(text.encode()) for text in held_out)
    assert data.validation_bytes == total if bos else total - 4 * len(held_out) <= data.validation_bytes < total
    assert predicted.count(data.tokenizer.eos_id) == len(held_out)
    if bos:
        assert data.tokenizer.decode(predicted) == "".join(held_out)
    assert len(gzip.compress("".join(held_out).encode())) > 0


def test_held_out_documents_are_not_trained_on(config):
    data = build(config)
    trained = data.tokenizer.decode(data._train_windows[0]._split.tokens)
    assert not any(text in trained for text in data.validation_texts())


def test_validation_budget_takes_whole_documents(config):
    everything = list(build(config).validation_texts())
    data = build(dataclasses.replace(config, validation_max_bytes=len(everything[0].encode()) + 1))
    assert list(data.validation_texts()) == everything[:2]
    assert data.validation_bytes == sum(len(text.encode()) - 1 for text in everything[:2])
    assert data.tokens_per_epoch == build(config).tokens_per_epoch


def test_a_corpus_shorter_than_a_row_is_padded(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    source = TextFilesConfig(paths=(str(tmp_path / "a.txt"),), validation_fraction=0)
    config = DataConfig(source=source, tokenizer=ByteTokenizerConfig(), cache_dir=str(tmp_path / "cache"))
    data = build(config)
    assert data.num_train_rows == 1
    batch = read(data, [2], 3)[0]
    expected = [*b"short", byte_tokenizer().eos_id] + [0] * (SEQ_LEN - 5)
    assert batch["tokens"].tolist() == [expected] * 2
    assert batch["segment_ids"].sum() == 12
    assert len(data.validation_rows()) == 0 and data.validation_bytes == 0


def test_eos_is_left_out_when_there_is_none_and_bos_is_refused(config, tmp_path):
    byte_tokenizer().save(tmp_path / "hf")
    (tmp_path / "hf/tokenizer_config.json").unlink()
    config = dataclasses.replace(config, tokenizer=HfTokenizerConfig(path=str(tmp_path / "hf")))
    data = build(config)
    assert data._train_windows[0]._split.tokens.max() < 256
    with pytest.raises(UserError, match="no bos token"):
        build(dataclasses.replace(config, bos=True))


def test_fingerprint_follows_what_decides_about_rows(config, text_files, tmp_path):
    def fingerprint(**changes):
        return build(dataclasses.replace(config, **changes)).fingerprint

    before = fingerprint()
    assert fingerprint(num_threads=1, num_prefetched=2, cache_dir=str(tmp_path / "other")) == before
    assert fingerprint(eos=False) != before
    assert fingerprint(tokenizer=BpeTokenizerConfig(vocab_size=300)) != before
    sha256 = build(config).corpus_sha256
    (tmp_path / "corpus/00.txt").write_text("changed")
    assert fingerprint() != before
    assert build(config).corpus_sha256 != sha256


def test_same_documents_elsewhere_have_the_same_fingerprint(config, text_files, tmp_path):
    (tmp_path / "corpus").rename(tmp_path / "moved")
    moved = TextFilesConfig(paths=(str(tmp_path / "moved/*.txt"),), validation_fraction=0.2)
    first = build(dataclasses.replace(config, source=moved))
    (tmp_path / "moved").rename(tmp_path / "corpus")
    assert build(config).fingerprint == first.fingerprint


def test_empty_corpora_and_senseless_settings(config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("one document")

    def of(name, fraction):
        return dataclasses.replace(
            config, source=TextFilesConfig(paths=(str(tmp_path / name),), validation_fraction=fraction)
        )

    with pytest.raises(UserError, match="the corpus is empty"):
        build(of("empty.txt", 0.05))
    with pytest.raises(UserError, match="no document is held out; give validation_paths"):
        build(of("one.txt", 1e-9))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="seq_len=0"):
        config.build(0, 0)
    for field in ("num_threads", "num_prefetched", "validation_max_bytes", "shuffle_window"):
        with pytest.raises(UserError, match=rf"data\.{field}=0"):
            dataclasses.replace(config, **{field: 0})
    with pytest.raises(UserError, match="num_workers=-1"):
        dataclasses.replace(config, num_workers=-1)
    with pytest.raises(UserError, match=r"set data\.streaming=True"):
        dataclasses.replace(config, num_workers=2)


def test_a_script_that_forgets_to_close_still_ends_quietly(config, tmp_path):
    script = f"""
        from experiments.data.files import TextFilesConfig
        from experiments.data.pipeline import DataConfig
        from experiments.tokenizer import ByteTokenizerConfig

        source = TextFilesConfig(paths=({config.source.paths[0]!r},), validation_fraction=0.2)
        config = DataConfig(source=source, tokenizer=ByteTokenizerConfig(), cache_dir={config.cache_dir!r})
        stream = config.build({SEQ_LEN}, 0, say=lambda line: None).train_stream()
        stream.next_rows(4)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == "" and done.stdout == ""
