"""What Star Attention was measured to cost, for the plan of a prompt: the figures of docs/star-accuracy.md.

benchmarks/accuracy.py writes measured.json from the results of `starling eval`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from starling.lab.statistics import Interval
from starling.scheduler.star.plan import StarPlan

FILE = Path(__file__).with_name("measured.json")


class MeasuredLoss(BaseModel):
    """One plan without dense heads, on the prompts of one model and length.

    Figures are means over tasks, and that of ``kl`` is the mean over all positions.

    Attributes:
        model: its name.
        tokens: of a prompt and its answer.
        prompts: how many.
        block_size, anchor_size, overlap_size: of the plan, in tokens.
        attended_keys: query-key pairs of the prefill, as a share of dense's.
        dense_score, score: from 0 to 1.
        difference: of the scores, star's less dense's.
        logprob_difference: of the tokens of the right answer, in nats for each token.
        kl: Kullback-Leibler divergence from dense, in nats, the mean over the tokens of all answers.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    tokens: int
    prompts: int
    block_size: int
    anchor_size: int
    overlap_size: int
    attended_keys: float
    dense_score: float
    score: float
    difference: Interval
    logprob_difference: Interval
    kl: float

    def __str__(self) -> str:
        loss, points = self.logprob_difference, self.difference
        return (
            f"{self.model}, {self.prompts} prompts of {self.tokens:,} tokens, B = {self.block_size:,}, "
            f"A = {self.anchor_size:,}, O = {self.overlap_size:,}, no dense heads: "
            f"log-probability {loss.mean:+.2f} [{loss.low:+.2f}, {loss.high:+.2f}] a token, score "
            f"{100 * points.mean:+.1f} [{100 * points.low:+.1f}, {100 * points.high:+.1f}] points of "
            f"{100 * self.dense_score:.0f}"
        )


def read_measured() -> list[MeasuredLoss]:
    """All measured losses."""
    return [MeasuredLoss.model_validate(row) for row in json.loads(FILE.read_text(encoding="utf-8"))]


def closest(plan: StarPlan, measured: Sequence[MeasuredLoss]) -> list[MeasuredLoss]:
    """For each model and length the measured plan that is most like a plan: with or without overlap, by n/B, by A/B."""
    ratio, share = math.log(plan.num_prompt_tokens / plan.block_size), plan.anchor_size / plan.block_size
    best: dict[tuple[str, int], tuple[tuple[float, float], MeasuredLoss]] = {}
    for row in measured:
        if bool(row.overlap_size) != bool(plan.overlap_size):
            continue
        difference = abs(math.log(row.tokens / row.block_size) - ratio)
        distance = difference, abs(row.anchor_size / row.block_size - share)
        key = row.model, row.tokens
        if key not in best or distance < best[key][0]:
            best[key] = distance, row
    return [row for _, row in best.values()]
