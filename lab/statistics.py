"""Means, ratios and bounds of values over prompts or runs, with bootstrap intervals whose random numbers are fixed.

The percentile bootstrap says nothing about losses that the sample does not have: without any loss its upper bound is
0. So the one-sided bounds add a prompt to the sample before it is drawn anew, with the worst loss that a prompt can
have. Where no prompt lost, the bound is then about 3/n, as in the rule of three.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

DRAWS, DRAWS_AT_ONCE, CONFIDENCE = 10_000, 500, 0.95
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
LOSSLESS_DRAWS = 3  # the added prompt is drawn at most so often in 95 % of draws, whatever the number of prompts is
MAX_PROMPTS = 1_000_000


class Interval(BaseModel):
    """A mean and its 95 % bootstrap interval."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float
    high: float


def mean_of_means(groups: Sequence[Sequence[float]]) -> float:
    return float(np.mean([np.mean(group) for group in groups]))


def bootstrap(groups: Sequence[Sequence[float]]) -> Interval:
    """Return the mean over groups of each group's mean, with its 95 % percentile interval; random numbers are fixed.

    The mean lies within the interval: without the last line, rounding can put it outside by 1e-17.

    Args:
        groups: paired differences, none empty. Prompts are drawn anew within each group.
    """
    rng = np.random.default_rng(0)
    drawn = np.zeros(DRAWS)
    for group in map(np.asarray, groups):
        for start in range(0, DRAWS, DRAWS_AT_ONCE):
            chosen = rng.integers(0, len(group), (DRAWS_AT_ONCE, len(group)))
            drawn[start : start + DRAWS_AT_ONCE] += group[chosen].mean(axis=1) / len(groups)
    low, high = np.quantile(drawn, TAILS)
    mean = mean_of_means(groups)
    return Interval(mean=mean, low=min(float(low), mean), high=max(float(high), mean))


def median_ratio(baseline: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of baseline / other over pairs of adjacent runs."""
    return statistics.median(first / second for first, second in zip(baseline, other, strict=True))


def ratio_interval(baseline: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return (median, lower, upper) of other / baseline over interleaved pairs.

    The interval is a 95 % bootstrap interval with a fixed seed.
    """
    ratios = np.asarray(other) / np.asarray(baseline)
    drawn = np.random.default_rng(0).choice(ratios, (DRAWS, len(ratios)))
    lower, upper = np.quantile(np.median(drawn, axis=1), TAILS)
    return float(np.median(ratios)), float(lower), float(upper)


def mean_ratio(values: np.ndarray, baseline: np.ndarray) -> list[float]:
    """Return [ratio, lower, upper] of the means of paired values: a 95 % bootstrap interval over pairs, fixed seed."""
    drawn = np.random.default_rng(0).integers(0, len(baseline), (DRAWS, len(baseline)))
    ratios = values[drawn].mean(1) / baseline[drawn].mean(1)
    return [float(values.mean() / baseline.mean()), *(float(bound) for bound in np.quantile(ratios, TAILS))]


def kl_divergence(dense: dict[int, float], other: dict[int, float]) -> float:
    """Return KL(dense || other) in nats, of two distributions of which only the most probable tokens are known.

    All tokens that are not in both lists count as one. The result is at least 0, and at most the exact divergence.

    Args:
        dense, other: token id -> log-probability.
    """
    common = dense.keys() & other.keys()
    terms = [(math.exp(dense[token]), math.exp(other[token])) for token in common]
    rest = tuple(max(1 - sum(share), 0.0) for share in zip(*terms, strict=True)) if terms else (1.0, 1.0)
    terms.append((rest[0], max(rest[1], 1e-12)))
    return max(sum(p * math.log(p / q) for p, q in terms if p > 0), 0.0)


def upper_bound(losses: Sequence[float], worst: float) -> float:
    """Return what the mean loss does not exceed, with a confidence of 95 %.

    Args:
        losses: losses of prompts, not empty.
        worst: the loss of the prompt that is added.
    """
    return _upper(losses, worst, len(losses))


def lower_bound(losses: Sequence[float], best: float) -> float:
    """Return what the mean loss does not fall below, with a confidence of 95 %.

    Args:
        losses: losses of prompts, not empty.
        best: the loss of the prompt that is added.
    """
    return 0.0 - _upper([-loss for loss in losses], -best, len(losses))


def _upper(losses: Sequence[float], added: float, number: int) -> float:
    """Return the bound for ``number`` prompts that lose what ``losses`` are, in the same shares, and the added one."""
    values, counts = np.unique(np.asarray(losses, dtype=float), return_counts=True)
    shares = np.append(counts * number / len(losses), 1.0) / (number + 1)
    drawn = np.random.default_rng(0).multinomial(number + 1, shares, DRAWS)
    means = drawn @ np.append(values, added) / (number + 1)
    return float(np.quantile(means, CONFIDENCE, method="higher"))


def prompts_needed(losses: Sequence[float], worst: float, budget: float) -> int | None:
    """Return about how many prompts bring the upper bound within the budget, if they lose what these lose.

    Args:
        losses: losses of the prompts so far, not empty.
        worst: the loss of the prompt that is added.

    Returns:
        At least ``len(losses)``; None if the mean loss is not below the budget, or more than MAX_PROMPTS are needed.
    """
    if np.mean(losses) >= budget:
        return None
    low = high = len(losses)
    while _upper(losses, worst, high) > budget:
        if high > MAX_PROMPTS:
            return None
        low, high = high, 2 * high
    while high - low > max(low // 100, 1):
        middle = (low + high) // 2
        low, high = (low, middle) if _upper(losses, worst, middle) <= budget else (middle, high)
    return high
