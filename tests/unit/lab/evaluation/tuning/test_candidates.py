"""The plans that are tried: what they cost, and that a server with their options makes the same plans."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.config.entry import parse_config
from starling.lab.evaluation.plans import parse_plan
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.tuning.candidates import (
    chosen_candidates,
    default_candidates,
    make_candidate,
    served_options,
)
from starling.scheduler.star.counts import dense_keys, keys_attended
from tests.unit.plans import make_plan


def prompts_of(*lengths: int) -> list[Prompt]:
    return [Prompt(str(number), "p", None, (1,) * n, "", (), "all", (), 4) for number, n in enumerate(lengths)]


def test_the_default_candidates_of_one_length():
    found = default_candidates(prompts_of(8192), 32, None)
    assert [candidate.plan.name for candidate in found] == [
        *("n/16", "n/16,A=256,O=256", "n/16,O=0"),
        *("n/8", "n/8,A=512,O=512", "n/8,O=0"),
        *("n/4", "n/4,A=1024,O=1024", "n/4,O=0"),
        *("n/3", "n/3,A=1376,O=1376", "n/3,O=0"),
    ]
    costs = [candidate.cost for candidate in found]
    assert costs == sorted(costs) and costs[0] > 0 and costs[-1] < 1
    for three in (costs[0:3], costs[3:6], costs[6:9], costs[9:12]):
        assert max(three) - min(three) < 1e-9, "one number of blocks, one cost"


def test_a_server_with_scores_is_asked_for_dense_heads_too():
    found = {
        candidate.plan.name: candidate for candidate in default_candidates(prompts_of(8192), 32, None, kv_heads=48)
    }
    shares = {"n/3,H=0", "n/4,H=0"} | {f"n/{n},H={h}" for n in (8, 16) for h in (0, 0.05, 0.1, 0.2)}
    assert {name for name in found if "A=" not in name and "O=0" not in name} == shares
    heads = next(iter(found["n/16,H=0.1"].numbers.values())).dense_heads
    assert (heads.count, heads.total) == (5, 48)
    without = found["n/16,H=0"].cost
    expected = without + 5 / 48 * (1 - without)
    assert found["n/16,H=0.1"].cost == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="the scores of this model's KV heads are not known"):
        chosen_candidates(["n/8,H=0.1"], prompts_of(8192), 32)


def test_what_the_pages_do_not_allow_is_left_out():
    """512 tokens are four pages of 128: a block of n/4 is one page, and two blocks of n/3 see all that dense sees."""
    found = default_candidates(prompts_of(512), 128, 32)
    assert [candidate.plan.name for candidate in found] == ["n/4,Q=32"]


@given(st.lists(st.integers(600, 9000), min_size=1, max_size=4), st.sampled_from([16, 32, 128]))
def test_a_server_with_a_candidates_options_makes_its_plans_and_keeps_shorter_prompts_dense(lengths, page_size):
    prompts = prompts_of(*lengths)
    for candidate in default_candidates(prompts, page_size, 64):
        config = json.loads(json.dumps({"starling": served_options(candidate.plan, min(lengths))}))
        star = parse_config(config).star
        for prompt in prompts:
            assert make_plan(len(prompt.token_ids), star, None, page_size) == candidate.numbers[prompt.name]
        assert make_plan(min(lengths) - 1, star, None, page_size) is None
        assert 0 < candidate.cost < 1


def test_chosen_candidates_come_by_cost():
    found = chosen_candidates(["n/4", "B=256,A=32,O=0", "n/8"], prompts_of(4096, 5000), 32)
    assert [candidate.plan.name for candidate in found] == ["B=256,A=32,O=0", "n/8", "n/4"]
    [four] = [candidate for candidate in found if candidate.plan.name == "n/4"]
    shares = [keys_attended(plan) / dense_keys(plan.num_prompt_tokens) for plan in four.numbers.values()]
    assert four.cost == pytest.approx(sum(shares) / 2)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("B=100", "the prompt 0, of 2000 tokens, can't have it: star_block_size=100 is refused"),
        ("n/8,A=1024", "can't have it: star_anchor_size=1024 is refused: it is larger than the star block"),
        ("B=2016", "would be dense with it"),
        ("n/8,Q=1500", "would get another plan from a server with these options"),
        ("n/2", "it attends to all keys that dense attends to"),
        ("B=512,A=512,O=512,Q=1000", "it attends to all keys that dense attends to"),
    ],
)
def test_candidates_that_are_refused(plan, reason):
    with pytest.raises(ValueError) as refused:
        make_candidate(parse_plan(plan), prompts_of(2000), 32)
    assert f"plan={plan!r} is refused" in str(refused.value) and reason in str(refused.value)


def test_prompts_that_are_too_short_are_named():
    with pytest.raises(ValueError, match="too short for star blocks of whole pages: 1 has 200 tokens, and a page 128"):
        default_candidates(prompts_of(4096, 200), 128, None)
