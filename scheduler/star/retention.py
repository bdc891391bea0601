"""Checks a request's ``star_retention`` against its plan and the engine; features/retention/ keeps the pages."""

from __future__ import annotations

from starling.config.parsing import OptionError
from starling.config.star import STAR_RETENTION
from starling.scheduler.star.facts import EngineFacts
from starling.scheduler.star.plan import StarPlan

ASKS_FOR_NO_PLAN = frozenset({"retention"})
"""Options that a prompt can have without star."""


def check_retention(value: str | tuple[str, ...], plan: StarPlan | None, why: str | None, engine: EngineFacts) -> None:
    """Refuse what a request says of its pages, where it would have no effect.

    Args:
        value: a word, or one for each document of the plan.
        why: the prompt has no plan.

    Raises:
        OptionError: as above.
    """
    if engine.retention_refusals:
        reason = f"this server can't follow it: {'; '.join(engine.retention_refusals)}"
        raise OptionError(STAR_RETENTION, value, reason, f"no {STAR_RETENTION}")
    if isinstance(value, str):
        return
    number = 0 if plan is None else len(plan.documents_behind_head)
    if not number:
        reason = f"the prompt has no documents{'' if why is None else f': {why}'}"
        raise OptionError(STAR_RETENTION, value, reason, "low, normal or high, for the whole prompt")
    if len(value) != number:
        reason = f"it has {len(value)} words, and the prompt has {number} documents, without the head and the question"
        raise OptionError(STAR_RETENTION, value, reason, "one word for each document, as /starling/cached lists them")
