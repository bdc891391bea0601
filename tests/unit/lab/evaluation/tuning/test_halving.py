"""The order of prompts, the rounds, and when a candidate is dropped."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.lab.evaluation.prompts import Prompt, distinct
from starling.lab.evaluation.tuning.search_options import MEASURES
from starling.lab.evaluation.tuning.tuner import halves, rounds, why_dropped

SCORE, LOGPROB = MEASURES["score"], MEASURES["logprob"]


def prompt(name: str, task: str = "vt", length: int | None = 10, token: int = 0) -> Prompt:
    return Prompt(name, task, length, (token, 1), "", ("yes",), "all", (5,), 4)


def cells_of(counts: list[int]) -> list[Prompt]:
    """``counts[i]`` different prompts of the task i."""
    return [
        prompt(f"{task} {index}", str(task), 10, 1000 * task + index)
        for task, count in enumerate(counts)
        for index in range(count)
    ]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10))
def test_halves_are_equal_in_size_and_in_tasks_and_do_not_depend_on_the_order(counts, seed):
    prompts = cells_of(counts)
    search, held_out = halves(prompts)
    assert {one.name for one in search} | {one.name for one in held_out} == {one.name for one in prompts}
    assert len(search) + len(held_out) == len(prompts)
    assert abs(len(search) - len(held_out)) <= 1
    of_task = [Counter(one.task for one in half) for half in (search, held_out)]
    assert all(abs(of_task[0][task] - of_task[1][task]) <= 1 for task in map(str, range(len(counts))))
    shuffled = prompts[:]
    Random(seed).shuffle(shuffled)
    assert halves(shuffled) == (search, held_out)


def test_tasks_take_turns_within_a_half():
    search, held_out = halves(cells_of([8, 8, 8]))
    for half in (search, held_out):
        assert all({one.task for one in half[start : start + 3]} == {"0", "1", "2"} for start in (0, 3, 6, 9))


def test_a_half_is_not_the_first_lines_of_a_file():
    search, _ = halves(cells_of([40]))
    numbers = sorted(one.token_ids[0] for one in search)
    assert numbers not in (list(range(20)), list(range(0, 40, 2)), list(range(1, 40, 2)))


def test_equal_prompts_count_once():
    prompts = [prompt("a", token=1), prompt("b", token=2), prompt("again", token=1)]
    assert [one.name for one in distinct(prompts)] == ["a", "b"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [1]), (8, [8]), (9, [8, 9]), (32, [8, 16, 32]), (150, [8, 16, 32, 64, 128, 150])],
)
def test_each_round_has_twice_as_many_prompts(count, expected):
    assert rounds(count) == expected


@pytest.mark.parametrize(
    ("losses", "cheaper", "measure", "reason"),
    [
        ([0.0] * 8, {}, SCORE, None),
        ([1.0] + [0.0] * 7, {}, SCORE, None),
        ([1.0] * 5 + [0.0] * 3, {}, SCORE, "it loses at least"),
        ([0.02] * 8, {}, LOGPROB, None),
        ([0.3] * 8, {}, LOGPROB, "it loses at least"),
        ([1.0, 0.0] * 20, {"n/8": [0.0] * 40}, SCORE, "it loses at least"),
        ([0.08, 0.0] * 8, {"n/8": [0.0] * 16}, LOGPROB, "n/8 costs no more and loses at least"),
        ([0.08, 0.0] * 8, {"n/8": [0.08, 0.0] * 8}, LOGPROB, None),
        ([0.08, 0.0] * 8, {"n/8": [0.09, 0.0] * 8}, LOGPROB, None),
        ([0.08, 0.0] * 8, {"n/8": [0.09, 0.0] * 8, "n/4": [0.0] * 16}, LOGPROB, "n/4 costs no more"),
    ],
)
def test_when_a_candidate_is_dropped(losses, cheaper, measure, reason):
    found = why_dropped(losses, cheaper, measure, 0.05)
    assert found is None if reason is None else found.startswith(reason)
