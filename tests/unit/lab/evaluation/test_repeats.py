"""Texts that several prompts have, by definition and by hand."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from starling.lab.evaluation.commands.advise import RUN, repeated_tokens


def by_definition(prompts: list[list[int]]) -> int:
    found, runs = 0, set()
    for number, prompt in enumerate(prompts):
        own = [tuple(prompt[start : start + RUN]) for start in range(len(prompt) - RUN + 1)]
        covered = {start + index for start, run in enumerate(own) if run in runs for index in range(RUN)}
        common = 0
        while any(other[: common + 1] == prompt[: common + 1] for other in prompts[:number]) and common < len(prompt):
            common += 1
        found += len([index for index in covered if index >= common])
        runs.update(own)
    return found


def words(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(50_000) for _ in range(count)]


HEAD, ONE, TWO = words(1, 50), words(2, 100), words(3, 70)


@pytest.mark.parametrize(
    ("prompts", "repeated"),
    [
        ([], 0),
        ([[], [1]], 0),
        ([HEAD + ONE + [1], HEAD + TWO + [2]], 0),  # the head is a prefix
        ([HEAD + ONE + TWO + [1], HEAD + TWO + ONE + [2]], 170),  # another order
        ([HEAD + ONE, [*HEAD, 7, *ONE, 2]], 100),  # at another offset
        ([HEAD + ONE + [1], HEAD + ONE + [2]], 0),
        ([[1, *ONE[: RUN - 1]], [2, *ONE[: RUN - 1]]], 0),  # too short a text
        ([[1, *ONE[:RUN]], [2, *ONE[:RUN]]], RUN),
        ([[*ONE, 1, *ONE]], 0),  # within one prompt
        ([HEAD + ONE] * 2, 0),
    ],
)
def test_a_text_counts_where_an_earlier_prompt_has_it_behind_another_beginning(prompts, repeated):
    assert repeated_tokens(prompts) == repeated == by_definition(prompts)


def test_random_prompts_of_few_texts():
    draw = random.Random(5)
    texts = [words(seed, draw.randrange(1, 90)) for seed in range(10, 20)]
    for _ in range(30):
        prompts = [[*chain(*draw.choices(texts, k=draw.randrange(6)))] for _ in range(5)]
        assert repeated_tokens(prompts) == by_definition(prompts)
