"""Which prompts are split over replicas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.sampling_params import SamplingParams

from starling.features.front_request import FrontRequest
from starling.features.replicas.split.split_prefill import is_split
from starling.scheduler.planning.decide import PLANNED, Decision, decision_of
from starling.scheduler.planning.plan import StarPlan
from tests.unit.engine_ext.front.simulation import (
    TOKENS,
)

PLAN = StarPlan(64, 64, 0, 500, 520, 2)


PROMPT = {"type": "token", "prompt_token_ids": TOKENS, PLANNED: Decision(PLAN, None, 520, TOKENS)}


def splits(prompt, params, keywords):
    return is_split(FrontRequest(None, None, prompt, params, "a", keywords, decision_of(prompt)))


def test_a_plan_for_several_replicas_is_split():
    assert splits(PROMPT, SamplingParams(), {})


@pytest.mark.parametrize(
    ("prompt", "params", "keywords"),
    [
        ("text", SamplingParams(), {}),
        (PROMPT | {"type": "multimodal"}, SamplingParams(), {}),
        (PROMPT, SamplingParams(prompt_logprobs=1), {}),
        (PROMPT, SamplingParams(skip_reading_prefix_cache=True), {}),
        (PROMPT, SamplingParams(), {"data_parallel_rank": 1}),
        (PROMPT, SimpleNamespace(), {}),
        ({"type": "token", "prompt_token_ids": TOKENS}, SamplingParams(), {}),
        (PROMPT | {PLANNED: Decision(None, "dense", 520, TOKENS)}, SamplingParams(), {}),
        (PROMPT | {PLANNED: Decision(StarPlan(64, 64, 0, 500, 520), None, 520, TOKENS)}, SamplingParams(), {}),
    ],
    ids=[
        "raw text",
        "images",
        "prompt logprobs",
        "no cache",
        "a rank of its own",
        "pooling",
        "not planned",
        "dense",
        "one replica",
    ],
)
def test_all_other_requests_are_vllms(prompt, params, keywords):
    assert not splits(prompt, params, keywords)
