"""What the loss of a prompt is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from starling.lab.evaluation.statistics import Pair, logprob_difference, top, two_scores

MeasureName = Literal["score", "logprob", "agreement"]


@dataclass(frozen=True)
class Measure:
    """A loss, from a plan's answer and dense's; positive where the plan is worse.

    Attributes:
        name: for --measure.
        meaning: of 100 points of mean loss.
        loss: of one prompt.
        worst: the largest loss that a prompt can have; None where there is none.
        has_logprobs: whether the distributions along the answer are needed.
    """

    name: MeasureName
    meaning: str
    loss: Callable[[Pair], float]
    worst: float | None
    has_logprobs: bool

    def assumed_worst(self, losses: Sequence[float]) -> float:
        """The loss of the prompt that an upper bound adds: the worst, or else the largest that was seen."""
        return max(*losses, 0.0) if self.worst is None else self.worst

    def assumed_best(self, losses: Sequence[float]) -> float:
        """The loss of the prompt that a lower bound adds: none, or the largest gain that was seen."""
        return min(*losses, 0.0)


def disagreement(pair: Pair) -> float:
    """The share of the answer's tokens at which another token than dense's is the most probable."""
    return float(np.mean([top(one) != top(two) for one, two in zip(*two_scores(pair), strict=True)]))


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("score", "the whole score", lambda pair: -pair.difference, 1.0, False),
        Measure("logprob", "1 nat for each token of the answer", lambda pair: -logprob_difference(pair), None, True),
        Measure("agreement", "another most probable token everywhere", disagreement, 1.0, True),
    )
}
