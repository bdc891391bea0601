"""One-sided bounds of a mean loss over prompts, by bootstrap with fixed random numbers.

The percentile bootstrap says nothing about losses that the sample does not have: without any loss its upper bound is
0. So one prompt is added to the sample before it is drawn anew, with the worst loss that a prompt can have. Where no
prompt lost, the bound is then about 3/n, as in the rule of three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
DRAWS = 10_000
LOSSLESS_DRAWS = 3  # the added prompt is drawn at most so often in 95 % of draws, whatever the number of prompts is
MAX_PROMPTS = 1_000_000


def upper_bound(losses: Sequence[float], worst: float) -> float:
    """What the mean loss does not exceed, with a confidence of 95 %.

    Args:
        losses: of prompts, not empty.
        worst: the loss of the prompt that is added.
    """
    return _upper(losses, worst, len(losses))


def lower_bound(losses: Sequence[float], best: float) -> float:
    """What the mean loss does not fall below, with a confidence of 95 %.

    Args:
        losses: of prompts, not empty.
        best: the loss of the prompt that is added.
    """
    return 0.0 - _upper([-loss for loss in losses], -best, len(losses))


def _upper(losses: Sequence[float], added: float, number: int) -> float:
    """The bound for ``number`` prompts that lose what ``losses`` are, in the same shares, and the added one."""
    values, counts = np.unique(np.asarray(losses, dtype=float), return_counts=True)
    shares = np.append(counts * number / len(losses), 1.0) / (number + 1)
    drawn = np.random.default_rng(0).multinomial(number + 1, shares, DRAWS)
    means = drawn @ np.append(values, added) / (number + 1)
    return float(np.quantile(means, CONFIDENCE, method="higher"))


def least_prompts(budget: float, worst: float) -> int:
    """How many prompts without any loss keep the upper bound within the budget.

    Args:
        budget: above 0.
        worst: the largest loss that a prompt can have.
    """
    return max(math.ceil(LOSSLESS_DRAWS * worst / budget - 1e-9) - 1, 1)


def prompts_needed(losses: Sequence[float], worst: float, budget: float) -> int | None:
    """About how many prompts bring the upper bound within the budget, if they lose what these lose.

    Args:
        losses: of the prompts so far, not empty.
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
