"""Which prompts run with the server's adapter."""

from __future__ import annotations

import msgspec
import pytest

from starling.config.adapter import Distilled, StarAdapter
from starling.config.star import parse_options
from starling.features.adapter.front import Adapter
from starling.scheduler.planning.decide import decide
from starling.scheduler.planning.facts import EngineFacts, PromptFacts
from starling.scheduler.planning.plan import StarPlan, describe

IDS = [*[7] * 40, *[8] * 60, *[9] * 20]
DOCUMENTS = {"star": "on", "star_segments": [20, 60, 100]}
BLOCKS = {"star": "on", "star_block_size": 32, "star_query_tokens": 20}


def adapter(*purposes: str) -> StarAdapter:
    made = Distilled(version=1, purposes=purposes, model="tiny")
    return StarAdapter(folder="/adapter", distilled=made, rank=8, target_modules=("q_proj",), digest="0123")


def used(options: dict, *purposes: str, has_lora: bool = False, defaults: dict | None = None) -> bool | None:
    """Whether a prompt runs with an adapter of these purposes; None: it has no plan."""
    engine = EngineFacts(4, with_adapter=Adapter(adapter(*purposes)).planned if purposes else None)
    facts = PromptFacts(len(IDS), IDS, has_lora=has_lora)
    plan = decide(parse_options(defaults or {}), parse_options(options), facts, engine).plan
    if plan is None:
        return None
    assert plan.adapter in ("", "0123")
    assert msgspec.convert(msgspec.to_builtins(plan), StarPlan) == plan
    assert describe(plan, len(IDS))["adapter"] is bool(plan.adapter)
    return bool(plan.adapter)


@pytest.mark.parametrize(
    ("options", "purposes", "expected"),
    [
        (DOCUMENTS, ("documents",), True),
        (DOCUMENTS, ("star",), False),
        (DOCUMENTS, ("documents", "star"), True),
        (DOCUMENTS, (), False),
        (BLOCKS, ("documents",), False),
        (BLOCKS, ("star",), True),
        (BLOCKS | {"star_dense_heads": 0}, ("star",), True),
        ({"star": "off"}, ("documents", "star"), None),
        (DOCUMENTS | {"star_adapter": "off"}, ("documents",), False),
        (DOCUMENTS | {"star_adapter": "auto"}, ("documents",), True),
    ],
)
def test_an_adapter_is_for_plans_that_it_was_trained_for(options, purposes, expected):
    assert used(options, *purposes) is expected


def test_a_lora_of_the_request_wins():
    assert used(DOCUMENTS, "documents", has_lora=True) is False
    assert used(DOCUMENTS | {"star_adapter": "auto"}, "documents", has_lora=True) is False
