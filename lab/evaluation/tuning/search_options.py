"""What a search for a plan measures as the loss of a prompt, and what it must keep to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from starling.lab.evaluation.comparison import Pair, logprob_difference, top
from starling.lab.evaluation.plans import DENSE, parse_plan, with_dense
from starling.lab.evaluation.prompt_options import DEFAULT_MAX_TOKENS, PromptOptions
from starling.lab.evaluation.prompts import read_own_prompts
from starling.lab.statistics import LOSSLESS_DRAWS, least_prompts

MeasureName = Literal["score", "logprob", "agreement"]
SETUP_VERSION = 1
DEFAULT_LOGPROBS = 8
LEAST_PROMPTS = 10  # of a half, for losses without a largest one


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
    return float(np.mean([top(one) != top(two) for one, two in pair.positions]))


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("score", "the whole score", lambda pair: -pair.difference, 1.0, False),
        Measure("logprob", "1 nat for each token of the answer", lambda pair: -logprob_difference(pair), None, True),
        Measure("agreement", "another most probable token everywhere", disagreement, 1.0, True),
    )
}


class TuneOptions(PromptOptions):
    """The options of `starling tune` that decide what it finds."""

    subcommand = "tune"
    budget: float = Field(gt=0, lt=100, description="points of mean loss, such as 2: 0.02 of a score")
    measure: MeasureName = Field("score", description="what a loss is; 100 points of logprob are 1 nat")
    logprobs: int | None = Field(
        None, ge=1, description=f"tokens of the answer that logprob and agreement compare: {DEFAULT_LOGPROBS}"
    )
    plans: tuple[str, ...] = Field((), description="the candidates, in place of the default ones")
    query_tokens: int | None = Field(
        None, ge=1, description="of the default candidates; default: 512, or half the prompt"
    )

    @property
    def chosen_measure(self) -> Measure:
        return MEASURES[self.measure]

    @property
    def compares_text(self) -> bool:
        return not self.chosen_measure.has_logprobs

    @property
    def mean_loss(self) -> float:
        """The budget as a mean loss: 1 is 100 points."""
        return self.budget / 100

    @property
    def num_logprobs(self) -> int:
        """Tokens of the answer at which the distributions are compared; 0 for scores."""
        return (self.logprobs or DEFAULT_LOGPROBS) if self.chosen_measure.has_logprobs else 0

    @property
    def least_prompts(self) -> int:
        """The prompts that are needed even if none of them loses: for both halves."""
        worst = self.chosen_measure.worst
        return 2 * (LEAST_PROMPTS if worst is None else least_prompts(self.mean_loss, worst))

    def check(self) -> None:
        """Refuse what can't be used (raises ValueError), also too few prompts for the budget."""
        super().check()
        if self.logprobs is not None and not self.chosen_measure.has_logprobs:
            raise ValueError(f"logprobs={self.logprobs} is refused: it has no effect with --measure {self.measure}")
        if not self.compares_text and self.max_tokens != DEFAULT_MAX_TOKENS:
            reason = f"it has no effect with --measure {self.measure}, which compares no text"
            raise ValueError(f"max_tokens={self.max_tokens} is refused: {reason}. Allowed: --measure score")
        if self.query_tokens is not None and self.plans:
            raise ValueError(f"query_tokens={self.query_tokens} is refused: with --plan, write Q into the plans")
        for plan in with_dense(map(parse_plan, self.plans)):
            if plan.options == {"star": "on"}:
                raise ValueError(f"plan={plan.name!r} is refused: it has no sizes. Allowed: a plan with sizes, as n/8")
        if DENSE.name in self.plans:
            raise ValueError("plan='dense' is refused: dense is always measured. Allowed: star plans")
        if self.prompts is not None:
            self.refuse_few(len({prompt.model_dump_json() for _, prompt in read_own_prompts(self.prompts)}))
        else:
            self.refuse_few(len(self.lengths) * len(self.chosen_tasks) * self.prompts_per_cell)

    def refuse_few(self, number: int) -> None:
        """Refuse (ValueError) a number of prompts that can't show any plan to be within the budget."""
        if number >= self.least_prompts:
            return
        cells = len(self.lengths) * len(self.chosen_tasks)
        enough = "" if self.prompts else f" (--prompts-per-cell {-(-self.least_prompts // cells)})"
        if self.chosen_measure.worst is None:
            raise ValueError(f"{number} different prompts are too few for an interval: {self.least_prompts} are needed")
        smallest = math.ceil(1000 * self.chosen_measure.worst * LOSSLESS_DRAWS / (number // 2 + 1)) / 10
        others = f"--budget {smallest:g} or more" if smallest < 100 else "a larger budget"
        raise ValueError(
            f"budget={self.budget:g} is refused: {number} different prompts can't show it, even if none of them loses. "
            f"Needed: at least {self.least_prompts} prompts{enough}. Or: {others}, or --measure logprob, which needs "
            f"{2 * LEAST_PROMPTS}"
        )

    def command(self, target: Sequence[str]) -> str:
        """The words of the command line that repeat the search, with the number of tokens that it took by default."""
        if self.num_logprobs == self.logprobs or not self.num_logprobs:
            return super().command(target)
        return self.model_copy(update={"logprobs": self.num_logprobs}).command(target)
