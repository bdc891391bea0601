"""The bounds of mean losses: their coverage is counted over all samples that can come out, without chance."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.lab.statistics import lower_bound, prompts_needed, upper_bound

SHARES = (0.002, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


@lru_cache
def bounds(size: int, lost: int) -> tuple[float, float]:
    """(lower, upper) where ``lost`` of ``size`` prompts lose everything."""
    losses = [1.0] * lost + [0.0] * (size - lost)
    return lower_bound(losses, 0.0), upper_bound(losses, 1.0)


@pytest.mark.parametrize("size", [10, 20, 60])
@pytest.mark.parametrize("share", SHARES)
def test_the_bounds_hold_as_often_as_they_say_where_prompts_lose_all_or_nothing(size, share):
    """Exactly, over the binomial distribution. Quantiles of so few values are coarse: 92.5 % is asked for, not 95."""
    chance = [comb(size, lost) * share**lost * (1 - share) ** (size - lost) for lost in range(size + 1)]
    found = [bounds(size, lost) for lost in range(size + 1)]
    assert sum(p for p, (_, high) in zip(chance, found, strict=True) if high >= share - 1e-9) >= 0.925
    assert sum(p for p, (low, _) in zip(chance, found, strict=True) if low <= share + 1e-9) >= 0.925


def coverage(kinds: dict[float, float], size: int, bound: Callable[[list[float]], float]) -> float:
    """How often a bound holds, exactly, of samples from three kinds of prompts: loss -> share."""
    (one, two, three), mean = kinds.items(), sum(loss * share for loss, share in kinds.items())
    held = 0.0
    for second in range(size + 1):
        for third in range(size + 1 - second):
            first = size - second - third
            chance = comb(size, second) * comb(size - second, third)
            chance *= one[1] ** first * two[1] ** second * three[1] ** third
            if chance > 1e-4:
                held += chance * (bound([one[0]] * first + [two[0]] * second + [three[0]] * third) >= mean)
    return held


def test_the_bound_holds_for_losses_with_a_rare_large_one():
    kinds = {0.0: 0.9, 0.1: 0.08, 1.0: 0.02}
    assert coverage(kinds, 30, lambda losses: upper_bound(losses, 1.0)) > 0.95
    assert coverage(kinds, 30, lambda losses: upper_bound(losses, 0.0)) < 0.6, "not without the added prompt"


@pytest.mark.parametrize("size", [10, 20])
def test_without_a_largest_loss_the_bound_holds_for_common_losses_and_not_for_rare_ones(size):
    """As docs/advise.md says of logprob: nothing tells of a loss that no prompt had."""
    assert coverage({0.0: 0.3, 0.1: 0.4, 0.2: 0.3}, size, lambda losses: upper_bound(losses, max(losses))) > 0.95
    rare = coverage({0.0: 0.5, 0.01: 0.45, 1.0: 0.05}, size, lambda losses: upper_bound(losses, max(losses)))
    assert rare == pytest.approx(1 - 0.95**size, abs=0.05), "only if it was drawn"


@pytest.mark.parametrize("number", [10, 59, 149, 299, 999])
def test_without_a_loss_the_bound_is_that_of_the_rule_of_three(number):
    assert upper_bound([0.0] * number, 1.0) == pytest.approx(3 / (number + 1))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
def test_the_mean_lies_between_the_bounds_and_they_mirror_one_another(losses):
    mean = sum(losses) / len(losses)
    low, high = lower_bound(losses, min(*losses, 0.0)), upper_bound(losses, max(*losses, 0.0))
    assert low - 1e-9 <= mean <= high + 1e-9
    assert lower_bound([-loss for loss in losses], -0.5) == -upper_bound(losses, 0.5)


@pytest.mark.parametrize(
    ("losses", "budget"), [([0.0] * 10, 0.02), ([0.0] * 99 + [1.0], 0.02), ([0.01, 0.02, 0.05] * 5, 0.04)]
)
def test_the_prompts_needed_are_enough_and_hardly_fewer_are(losses, budget):
    number = prompts_needed(losses, 1.0, budget)
    times = -(-number // len(losses))
    assert upper_bound(losses * times, 1.0) <= budget
    assert upper_bound(losses * max(times // 2, 1), 1.0) > budget


def test_where_no_number_of_prompts_is_enough():
    assert prompts_needed([0.0, 1.0], 1.0, 0.5) is None
    assert prompts_needed([0.0, 0.1], 0.1, 0.05 + 1e-9) is None, "only with more than a million"


def test_a_larger_budget_needs_fewer_prompts():
    numbers = [prompts_needed([0.0] * 50 + [1.0], 1.0, budget) for budget in (0.03, 0.05, 0.1, 0.5)]
    assert all(one >= two for one, two in pairwise(numbers))
    assert numbers[-1] == 51, "these prompts are enough"
