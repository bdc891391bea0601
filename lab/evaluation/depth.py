"""Scores by depth: where in the prompt the fact stands that the answer needs."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from starling.lab.evaluation.plans import DENSE
from starling.lab.evaluation.statistics import ALL, Interval, Pair, make_cell

THIRDS = ("0-33 %", "33-66 %", "66-100 %")


class DepthCell(BaseModel):
    """One star plan on the prompts of one length whose fact begins in one third of the text.

    Prompts of all tasks that have a depth, each prompt with equal weight.

    Attributes:
        depth: one of THIRDS; 0 % is the beginning of the text.
        length: tokens.
        prompts: how many.
        dense_score, score: the means, 0 to 1.
        difference: of the plan's score to dense's, with its interval.
        logprob_difference: the same of the answer's log-probability, in nats; None: not measured.
    """

    model_config = ConfigDict(frozen=True)

    depth: str
    length: int | None
    plan: str
    prompts: int
    dense_score: float
    score: float
    difference: Interval
    logprob_difference: Interval | None


def compare_depths(pairs: Sequence[Pair]) -> list[DepthCell]:
    """A cell for each length, plan and third that has prompts; none where no prompt has a depth."""
    groups: dict[tuple[int | None, str], list[list[Pair]]] = {}
    for pair in pairs:
        if pair.prompt.depth is not None and pair.answer.plan != DENSE.name:
            thirds = groups.setdefault((pair.prompt.length, pair.answer.plan), [[] for _ in THIRDS])
            thirds[third(pair.prompt.depth)].append(pair)
    return [
        DepthCell(depth=name, **make_cell(ALL, length, plan, [group]).model_dump(include={*DepthCell.model_fields}))
        for (length, plan), thirds in groups.items()
        for name, group in zip(THIRDS, thirds, strict=True)
        if group
    ]


def third(depth: float) -> int:
    """The index in THIRDS of a depth from 0 to 1."""
    return min(int(depth * len(THIRDS)), len(THIRDS) - 1)
