"""The recall task: where items are planted, at which distance, and how often in training."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from benchmarks.random_llama import byte_tokenizer
from examples.recall import DISTANCES, WIDTH, plant, random_distances
from examples.recall import MARK as MARK_TOKEN
from examples.stdlib_text import Text
from examples.train_attamba import parse, training_batch

MARK, VOCABULARY = 3, 50


def planted_tokens(distances: list[list[int]], length: int = 1024):
    tokens = torch.zeros(len(distances), length, dtype=torch.int64)
    return tokens, plant(tokens, MARK, VOCABULARY, distances, seed=1)


def test_a_value_is_behind_the_second_of_two_equal_keys():
    tokens, planted = planted_tokens([[512, 256, 128, 64, 32]] * 4)
    assert len(planted) > 10
    for pair in planted:
        second = tokens[pair.row, pair.position - WIDTH + 1 : pair.position + 1]
        first = tokens[pair.row, pair.position - WIDTH + 1 - pair.distance : pair.position + 1 - pair.distance]
        assert torch.equal(first, second)
        assert second[0] == MARK and (second[1:] > MARK).all() and (second < VOCABULARY).all()
        row = tokens[pair.row].tolist()
        after_mark = [token for token, before in zip(row[1:], row, strict=False) if before == MARK]
        assert after_mark.count(second[1].item()) == 2  # no other pair of the row has this key
    assert (tokens == MARK).sum() == 2 * len(planted)


def test_pairs_that_do_not_fit_are_left_out():
    tokens, planted = planted_tokens([[512, 20]], length=100)
    assert [pair.distance for pair in planted] == [20]
    assert (tokens != 0).sum() == 2 * WIDTH


def test_random_distances_cover_the_range_evenly_in_logarithm():
    drawn = torch.tensor(random_distances(20, 100, seed=0)).flatten()
    assert drawn.min() >= DISTANCES[0] and drawn.max() <= DISTANCES[-1]
    for low, high in pairwise(DISTANCES):
        assert 0.15 < ((drawn >= low) & (drawn < high)).double().mean() < 0.35


@pytest.mark.parametrize(("share", "expected"), [("0", 0), ("0.25", 4), ("0.5", 8), ("1", 16)])
def test_the_share_of_training_sequences_with_the_task(share, expected, tmp_path):
    zeros, tokenizer = torch.zeros(5000, dtype=torch.int16), byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK_TOKEN]})
    text = Text(zeros, zeros, "zeros", torch.ones(len(tokenizer) + 20), tokenizer)
    arguments = ["--out", str(tmp_path), "--length", "1024", "--batch", "2", "--recall", share]
    rows = torch.cat([training_batch(parse(arguments), text, step) for step in range(8)])
    assert (rows != 0).any(1).sum() == expected
    assert torch.equal(rows[:2], training_batch(parse(arguments), text, 0))
