"""The order of the prompts, the rounds of the search, and when a candidate leaves it. Pure functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from starling.lab.evaluation.plans import DENSE, parse_plan
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.runner import key_of
from starling.lab.evaluation.store import Store
from starling.lab.evaluation.tuning.loss_bounds import lower_bound
from starling.lab.evaluation.tuning.measures import Measure

FIRST_ROUND = 8  # prompts


def halves(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to search with, and those to confirm with, each in the order in which it is measured.

    A prompt's place depends on the hash of its tokens, not on its place in a file. Tasks and lengths take turns, so
    that each start of the order has about equally many of each, and both halves do.
    """
    cells: dict[tuple[str, int | None], list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda prompt: hashlib.sha256(json.dumps(prompt.token_ids).encode()).digest()):
        cells.setdefault((prompt.task, prompt.length), []).append(prompt)
    dealt: list[list[tuple[int, Prompt]]] = [[], []]
    number = 0
    for key in sorted(cells, key=lambda key: (key[0], key[1] or 0)):
        for index, prompt in enumerate(cells[key]):
            dealt[number % 2].append((index, prompt))
            number += 1
    search, held_out = ([prompt for _, prompt in sorted(half, key=lambda item: item[0])] for half in dealt)
    return search, held_out


def measured_plans(held_out: Sequence[Prompt], store: Store, model: str, num_logprobs: int) -> list[str]:
    """The star plans, by name, under which a held-out prompt has been measured before."""
    plans = {answer.plan: None for answer in store.answers.values() if answer.plan != DENSE.name}
    return [
        plan.name
        for plan in map(parse_plan, plans)
        if any(key_of(prompt, plan, model, num_logprobs) in store.answers for prompt in held_out)
    ]


def rounds(count: int) -> list[int]:
    """How many prompts each round has measured at its end: twice as many as the one before, ``count`` at last."""
    sizes = []
    size = FIRST_ROUND
    while size < count:
        sizes.append(size)
        size *= 2
    return [*sizes, count]


def why_dropped(
    losses: Sequence[float], cheaper: Mapping[str, Sequence[float]], measure: Measure, budget: float
) -> str | None:
    """Why a candidate can't be the result; None where it can.

    Args:
        losses: of the candidate, of the prompts so far.
        cheaper: plan -> losses of the same prompts, of the candidates that cost no more.
    """
    low = lower_bound(losses, measure.assumed_best(losses))
    if low > budget:
        return f"it loses at least {100 * low:.1f}"
    for plan, others in cheaper.items():
        more = [mine - other for mine, other in zip(losses, others, strict=True)]
        best = -measure.worst if measure.worst is not None else -max(map(abs, more))
        gap = lower_bound(more, best)
        if gap > 0:
            return f"{plan} costs no more and loses at least {100 * gap:.1f} less"
    return None
