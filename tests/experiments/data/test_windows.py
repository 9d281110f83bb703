"""Rows against a brute-force reference that knows nothing of offsets or searches."""

import numpy as np
import pytest

from experiments.data.token_cache import TokenizedSplit
from experiments.data.windows import Windows


def split_of(lengths, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 60_000, sum(lengths)).astype(np.uint16)
    return TokenizedSplit(tokens=tokens, offsets=np.cumsum([0, *lengths]), predicted_bytes=0)


def reference_rows(split, lengths, seq_len, keep_last):
    stream = [
        (int(token), number)
        for number, ids in enumerate(np.split(split.tokens, np.cumsum(lengths)[:-1]))
        for token in ids
    ]
    rows = []
    for start in range(0, max(len(stream) - 1, 0), seq_len):
        piece = stream[start : start + seq_len + 1]
        if len(piece) < seq_len + 1 and not keep_last and rows:
            break
        tokens, segments, positions = [], [], []
        segment, previous = 0, None
        for token, document in piece:
            if document != previous:
                segment, position, previous = segment + 1, 0, document
            tokens.append(token)
            segments.append(segment)
            positions.append(position)
            position += 1
        pad = [0] * (seq_len + 1 - len(piece))
        rows.append({"tokens": tokens + pad, "segment_ids": segments + pad, "positions": positions + pad})
    return rows


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("seq_len", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("lengths", [[1], [2], [17], [8, 8, 8], [1, 1, 1, 1, 1], [3, 1, 20, 2, 7], [5, 60, 1]])
def test_rows_equal_the_reference(lengths, seq_len, keep_last):
    split = split_of(lengths)
    windows = Windows(split, seq_len, keep_last=keep_last)
    expected = reference_rows(split, lengths, seq_len, keep_last)
    assert len(windows) == len(expected)
    for row, wanted in zip(windows, expected, strict=True):
        assert set(row) == set(wanted)
        for name, values in wanted.items():
            assert row[name].dtype == np.int32
            assert row[name].tolist() == values, name


@pytest.mark.parametrize("seq_len", [3, 7, 100])
def test_every_token_but_a_documents_first_is_a_target_exactly_once(seq_len):
    lengths = [4, 1, 9, 2, 30, 3]
    tokens = np.arange(sum(lengths), dtype=np.uint16)  # each token is its own index
    split = TokenizedSplit(tokens=tokens, offsets=np.cumsum([0, *lengths]), predicted_bytes=0)
    targets = []
    for row in Windows(split, seq_len, keep_last=True):
        segments = row["segment_ids"]
        targets += row["tokens"][1:][(segments[1:] == segments[:-1]) & (segments[1:] != 0)].tolist()
    first = np.cumsum([0, *lengths])[:-1]
    assert targets == [index for index in range(sum(lengths)) if index not in first]


def test_no_such_row():
    with pytest.raises(IndexError):
        Windows(split_of([10]), 4, keep_last=False)[2]
    assert len(Windows(split_of([1]), 4, keep_last=True)) == 0
