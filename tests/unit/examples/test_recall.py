"""The recall task: which tokens repeat, at which distances, and how often in training."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from examples.recall import DISTANCES, random_distances, repeated
from examples.stdlib_text import Text
from examples.train_attamba import parse, training_batch


def test_a_row_repeats_distinct_tokens_at_its_distance():
    tokens = repeated([40, 7], 100, vocabulary=50, seed=1)
    for row, distance in zip(tokens, (40, 7), strict=True):
        assert torch.equal(row[distance:], row[:-distance])
        assert len(set(row.tolist())) == distance
        assert row.min() >= 1 and row.max() < 50
    assert not torch.equal(tokens, repeated([40, 7], 100, vocabulary=50, seed=2))


def test_random_distances_cover_the_range_evenly_in_logarithm():
    drawn = torch.tensor(random_distances(2000, 1024, seed=0))
    assert drawn.min() >= DISTANCES[0] and drawn.max() <= DISTANCES[-1]
    for low, high in pairwise(DISTANCES):
        assert 0.15 < ((drawn >= low) & (drawn < high)).double().mean() < 0.35
    assert max(random_distances(2000, 200, seed=0)) == 100  # the second copy fits


@pytest.mark.parametrize(("share", "expected"), [("0", 0), ("0.25", 4), ("0.5", 8), ("1", 16)])
def test_the_share_of_training_sequences_with_the_task(share, expected, tmp_path):
    zeros = torch.zeros(5000, dtype=torch.int16)
    text = Text(zeros, zeros, "zeros", torch.ones(600))
    arguments = ["--out", str(tmp_path), "--length", "200", "--batch", "2", "--recall", share]
    rows = torch.cat([training_batch(parse(arguments), text, step) for step in range(8)])
    assert (rows != 0).any(1).sum() == expected
    assert torch.equal(rows[:2], training_batch(parse(arguments), text, 0))
