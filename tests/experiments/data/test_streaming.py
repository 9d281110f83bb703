"""The streaming pipeline: exact resume from Grain's own state, and a refusal where that state does not fit."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.data.files import JsonlConfig
from experiments.data.pipeline import DataConfig
from experiments.data.sources import MixtureConfig
from experiments.errors import UserError
from experiments.tokenizer import ByteTokenizerConfig

SEQ_LEN = 32


@pytest.fixture
def config(tmp_path, texts):
    for number in range(8):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::8]]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    return DataConfig(
        source=JsonlConfig(paths=(str(tmp_path / "*.jsonl"),), validation_fraction=0.2),
        tokenizer=ByteTokenizerConfig(),
        cache_dir=str(tmp_path / "cache"),
        streaming=True,
        shuffle_window=8,
    )


def build(config, **processes):
    return config.build(SEQ_LEN, 0, say=lambda _: None, **processes)


def read(data, counts, state=0):
    """Batches of the given sizes, and the state before each and after the last."""
    stream = data.train_stream(state)
    batches, states = [], []
    try:
        for count in counts:
            states.append(json.dumps(stream.state))
            batches.append(stream.next_rows(count))
        return batches, [*states, json.dumps(stream.state)]
    finally:
        stream.close()


def documents_in(batches, tokenizer):
    """Texts whose EOS was seen, put together over consecutive rows."""
    tokens = np.concatenate([batch["tokens"].ravel() for batch in batches])
    pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)
    return [tokenizer.decode(piece) for piece in pieces[:-1]]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other) == {"tokens", "segment_ids", "positions"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_epochs_hold_every_training_document_once_in_another_order(config, texts):
    data = build(dataclasses.replace(config, shuffle_window=1))  # larger windows reach into the next epoch
    assert data.num_train_rows is None and data.tokens_per_epoch is None
    seen = documents_in(read(data, [700])[0], data.tokenizer)
    train = set(texts) - set(data.validation_texts())
    assert len(seen) > 2 * len(train)
    first, second = seen[: len(train)], seen[len(train) : 2 * len(train)]
    assert set(first) == set(second) == train
    assert first != second


def test_rows_are_packed_like_the_cached_ones(config):
    (batch,), _ = read(build(config), [20])
    for array in batch.values():
        assert array.shape == (20, SEQ_LEN + 1) and array.dtype == np.int32
    assert batch["segment_ids"].min() == 1
    starts = np.diff(batch["segment_ids"], axis=1, prepend=0) != 0
    assert ((batch["positions"] == 0) == starts).all()


def test_resume_from_every_state(config):
    data = build(config)
    batches, states = read(data, [2] * 40)
    for step in range(38):
        assert json.loads(states[step])["index"] == 2 * step
        assert_equal(read(data, [2, 2], json.loads(states[step]))[0], batches[step : step + 2])


def test_state_before_the_first_and_after_the_last_row(config):
    data = build(config)
    batches, states = read(data, [2] * 4)
    assert json.loads(states[0]) == {"index": 0}
    stream = data.train_stream(json.loads(states[2]))
    assert json.loads(json.dumps(stream.state)) == json.loads(states[2])
    first = stream.next_rows(2)
    stream.close()
    stream.close()
    assert_equal([first], batches[2:3])
    assert_equal(read(data, [2], json.loads(json.dumps(stream.state)))[0], batches[3:])


def test_mixture_resumes(config):
    members = (config.source, dataclasses.replace(config.source, validation_fraction=0.5))
    data = build(dataclasses.replace(config, source=MixtureConfig(members=members, weights=(2.0, 1.0))))
    batches, states = read(data, [3] * 10)
    for step in range(9):
        assert_equal(read(data, [3], json.loads(states[step]))[0], batches[step : step + 1])


def test_processes_share_the_documents_and_resume_from_their_own_states(config, texts):
    two = [build(config, process_index=p, process_count=2) for p in range(2)]
    results = [read(data, [40, 20]) for data in two]
    seen = [set(documents_in(batches, data.tokenizer)) for data, (batches, _) in zip(two, results, strict=True)]
    assert seen[0] and seen[1] and not seen[0] & seen[1]
    for data, (batches, states) in zip(two, results, strict=True):
        assert_equal(read(data, [20], json.loads(states[1]))[0], batches[1:])
    saved = json.loads(results[0][1][1])
    with pytest.raises(UserError, match="the number of processes is 1, but this streaming position fits only 2"):
        build(config).train_stream(saved)
    with pytest.raises(UserError, match="the process index is 1, but this streaming position fits only 0"):
        two[1].train_stream(saved)


def test_processes_share_the_documents_of_a_single_file(config, tmp_path, texts):
    (tmp_path / "all.jsonl").write_text("".join(path.read_text() for path in sorted(tmp_path.glob("?.jsonl"))))
    source = JsonlConfig(paths=(str(tmp_path / "all.jsonl"),), validation_fraction=0)
    config = dataclasses.replace(config, source=source)
    two = [build(config, process_index=p, process_count=2) for p in range(2)]
    seen = [set(documents_in(read(data, [500])[0], data.tokenizer)) for data in two]
    assert len(seen[0]) == len(seen[1]) == 40
    assert seen[0] | seen[1] == set(texts)


def test_more_processes_than_documents_are_refused(config, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "only one"}\n')
    source = JsonlConfig(paths=(str(tmp_path / "one.jsonl"),), validation_fraction=0)
    stream = build(dataclasses.replace(config, source=source), process_index=1, process_count=2).train_stream()
    with pytest.raises(UserError, match="too few documents"):
        stream.next_rows(2)
    stream.close()


def test_workers_resume_and_other_worker_counts_are_refused(config):
    data = build(dataclasses.replace(config, num_workers=2))
    batches, states = read(data, [4] * 6)
    assert_equal(read(data, [4, 4], json.loads(states[3]))[0], batches[3:5])
    with pytest.raises(
        UserError, match=r"data\.num_workers is 0, but this streaming position fits only 2; use 2 again"
    ):
        build(config).train_stream(json.loads(states[3]))


def test_positions_of_the_other_kind_are_refused(config):
    streaming, cached = build(config), build(dataclasses.replace(config, streaming=False))
    with pytest.raises(UserError, match=r"saved with data\.streaming=False"):
        streaming.train_stream(8)
    _, states = read(streaming, [2])
    with pytest.raises(UserError, match=r"saved with data\.streaming=True"):
        cached.train_stream(json.loads(states[1]))


def test_validation_is_that_of_the_cached_pipeline(config):
    streaming, cached = build(config), build(dataclasses.replace(config, streaming=False))
    assert streaming.validation_bytes == cached.validation_bytes > 0
    assert_equal(list(streaming.validation_rows()), list(cached.validation_rows()))


def test_a_corrupt_line_stops_training_with_its_name(config, tmp_path):
    data, path = build(config), tmp_path / "1.jsonl"
    path.write_text(path.read_text() + '{"text": "cut')
    stream = data.train_stream()
    with pytest.raises(UserError, match=r"1\.jsonl:11: Unterminated string"):
        stream.next_rows(400)
    stream.close()
