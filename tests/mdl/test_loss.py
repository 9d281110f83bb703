"""Targets and counts by brute force, and the head's loss on documents that cross every boundary."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import BATCH, LENGTHS, T, packed_batch

from mdl.loss import count_targets, targets_at_depth


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_targets_stay_in_their_document(depth):
    tokens, segments = BATCH["tokens"][0], BATCH["segment_ids"][0]
    got_tokens, got_valid = targets_at_depth(jnp.asarray(tokens), jnp.asarray(segments), depth)
    assert got_tokens.shape == got_valid.shape == (len(LENGTHS), T)
    for b, t in np.ndindex(len(LENGTHS), T):
        end = t + 1 + depth
        inside = end <= T and segments[b, t] > 0 and segments[b, end] == segments[b, t]
        assert got_valid[b, t] == inside
        if inside:
            assert got_tokens[b, t] == tokens[b, end]


def test_counts_of_a_whole_step():
    """A document of n tokens has n - 1 - k targets at depth k; rows without a token do not count."""
    counts = count_targets(jnp.asarray(BATCH["segment_ids"].reshape(4, 2, -1)), 2)

    def targets(k):
        return sum(max(n - 1 - k, 0) for row in LENGTHS for n in row)

    assert counts.targets == targets(0)
    assert [int(n) for n in counts.mtp_targets] == [targets(1), targets(2)]
    assert counts.rows == 7


def test_counts_of_nothing_are_one():
    counts = count_targets(jnp.asarray(packed_batch([[], []])["segment_ids"]), 1)
    assert (counts.targets, counts.mtp_targets[0], counts.rows) == (1, 1, 1)
