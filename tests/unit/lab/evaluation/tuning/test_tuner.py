"""The search, against a server in this process whose losses are known."""

from __future__ import annotations

import asyncio

import pytest

from starling.lab.evaluation.answers import ServerError
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.runner import Memory
from starling.lab.evaluation.tuning.candidates import chosen_candidates, default_candidates
from starling.lab.evaluation.tuning.search_options import MEASURES
from starling.lab.evaluation.tuning.tune_report import candidate_results
from starling.lab.evaluation.tuning.tuner import Tuner, find_engine, halves
from tests.unit.lab.evaluation.fake_server import served

PLANS = ("n/16,A=1", "n/16", "n/8", "n/4")  # the cheapest first


def prompts_of(count: int) -> list[Prompt]:
    """Prompts of 2,000 tokens, which begin with their numbers."""
    texts = [f"{number:03}" + "x" * 1997 for number in range(count)]
    return [Prompt(text[:3], "own", None, tuple(map(ord, text)), "", ("yes",), "all", (7,), 8) for text in texts]


def answers(losing: dict[str, float]):
    """Dense is always right. A plan is wrong on that share of the prompts which ``losing`` gives for it."""

    def answer(prompt: str, xargs: dict) -> str:
        if xargs["star"] == "off":
            return "yes"
        name = xargs["star_block_size"] + (",A=1" if "star_anchor_size" in xargs else "")
        return "no" if int(prompt[:3]) % 100 < 100 * losing.get(name, 0.0) else "yes"

    return answer


def search(fake, count: int, budget: float, plans=PLANS, measure: str = "score", store=None, on_round=None, kv_heads=0):
    async def searched():
        prompts = prompts_of(count)
        candidates = chosen_candidates(plans, prompts, 1, kv_heads)
        async with Client(fake.url) as client:
            tuner = Tuner(
                client,
                MEASURES[measure],
                num_logprobs=2 if MEASURES[measure].has_logprobs else 0,
                concurrency=4,
                store=store or Memory(),
            )
            return await tuner.search(*halves(prompts), candidates, budget, on_round or (lambda left: None))

    return asyncio.run(searched())


def test_the_cheapest_plan_without_a_loss_is_found_and_confirmed():
    losing = {"n/16,A=1": 0.9, "n/16": 0.5}
    with served(answer=answers(losing)) as fake:
        tuning = search(fake, 100, 0.1)
    assert tuning.chosen.candidate.plan.name == "n/8"
    assert tuning.held_out == [0.0] * 50
    dropped = {trial.candidate.plan.name: trial.dropped_after for trial in tuning.trials}
    assert dropped["n/16,A=1"] == 8, "the first round shows it"
    assert dropped["n/16"] in (8, 16, 32)
    assert dropped["n/8"] is dropped["n/4"] is None
    assert [len(trial.losses) for trial in tuning.trials[2:]] == [50, 16], "n/4 is not needed once n/8 is good enough"


def test_a_plan_that_loses_too_much_later_brings_back_the_ones_that_cost_more():
    """n/8 begins to lose where it already seemed good enough."""
    prompts = prompts_of(200)
    late = {prompt.name for prompt in halves(prompts)[0][64:]}

    def answer(prompt: str, xargs: dict) -> str:
        return "no" if xargs.get("star_block_size") == "n/8" and prompt[:3] in late else "yes"

    with served(answer=answer) as fake:
        tuning = search(fake, 200, 0.05, ("n/8", "n/4"))
    eight, four = tuning.trials
    assert tuning.chosen is four
    assert eight.dropped_after == 100 and len(four.losses) == 100


def test_without_a_plan_within_the_budget_nothing_is_held_out():
    with served(answer=answers(dict.fromkeys(PLANS, 0.9))) as fake:
        tuning = search(fake, 60, 0.1)
        held_out = {prompt.token_ids for prompt in halves(prompts_of(60))[1]}
        assert not held_out & {tuple(body["prompt"]) for body in fake.completions}
    assert (tuning.chosen, tuning.held_out) == (None, [])
    assert all(trial.dropped_after for trial in tuning.trials)


def test_rounds_are_announced_with_the_candidates_that_are_left():
    rounds = []
    with served(answer=answers({"n/16,A=1": 0.9})) as fake:
        search(fake, 60, 0.1, on_round=lambda left: rounds.append(len(left)))
    assert rounds == [4, 3, 3]


def test_a_second_search_asks_nothing_again_and_a_smaller_budget_only_what_is_new():
    store = Memory()
    with served(answer=answers({"n/16,A=1": 0.9})) as fake:
        first = search(fake, 100, 0.1, store=store)
        asked = len(fake.completions)
        again = search(fake, 100, 0.1, store=store)
        assert len(fake.completions) == asked + 1  # what asks whether Starling is there
        assert [trial.losses for trial in again.trials] == [trial.losses for trial in first.trials]
        search(fake, 100, 0.059, store=store)
        bodies = [(tuple(body["prompt"]), str(body.get("vllm_xargs"))) for body in fake.completions]
        assert len(set(bodies)) == len(bodies) - 2


def test_answers_under_another_spelling_of_a_plan_count_for_the_search():
    store = Memory()
    with served(answer=answers({"n/16": 0.9})) as fake:
        first = search(fake, 60, 0.1, ("B=n/16", "O=0,n/4"), store=store)
        again = search(fake, 60, 0.1, ("n/16", "n/4,O=0"), store=store)
    assert [len(trial.losses) for trial in again.trials] == [len(trial.losses) for trial in first.trials]
    assert (again.chosen.candidate.plan.name, again.held_out) == ("n/4,O=0", [0.0] * 30)


def test_log_probabilities_as_losses():
    """By n/8, each token is 0.02 nats less probable; by n/4, by 0.001; n/16 loses more."""

    def loss(prompt: str, xargs: dict) -> float:
        return {125: 0.3, 250: 0.02, 500: 0.001}[xargs["star_block_size"]]

    for budget, expected in ((0.05, "n/8"), (0.01, "n/4"), (0.5, "n/16,A=1")):
        with served(answer=lambda prompt, xargs: "yes", loss=loss) as fake:
            tuning = search(fake, 20, budget, measure="logprob")
        assert tuning.chosen.candidate.plan.name == expected
    assert tuning.held_out == pytest.approx([0.3] * 10)


def test_agreement_counts_other_most_probable_tokens():
    with served(answer=lambda prompt, xargs: "yes", loss=lambda prompt, xargs: 0.5) as fake:
        tuning = search(fake, 20, 0.5, ["n/8"], measure="agreement")
    assert tuning.trials[0].losses == [1.0] * 8, "the forced token is less probable than token 1 then"


@pytest.mark.parametrize(
    ("defaults", "field"),
    [
        ({"star_anchor_size": 2}, "anchor_size 2"),
        ({"star_anchor_size": 2, "star_overlap_size": 3}, "anchor_size 2"),
        ({"star_query_tokens": 9}, "context_end"),
    ],
)
def test_a_server_whose_own_options_change_a_plan_is_refused(defaults, field):
    with (
        served(answer=answers({}), defaults=defaults) as fake,
        pytest.raises(ServerError, match=f"plan='n/8' has {field}.*: the server's own star options or its"),
    ):
        search(fake, 20, 0.5, ["n/8"])


def test_a_plan_of_equal_cost_that_was_not_good_enough_is_not_called_unneeded():
    """One of its 30 prompts loses everything."""
    [loser] = [prompt.name for prompt in halves(prompts_of(60))[0][20:21]]

    def answer(prompt: str, xargs: dict) -> str:
        return "no" if xargs.get("star_overlap_size") == 240 and prompt[:3] == loser else "yes"

    plans = ("n/8,A=10,O=240", "n/8,A=20,O=230")
    with served(answer=answer) as fake:
        tuning = search(fake, 60, 0.13, plans)
    first, second = candidate_results(tuning, MEASURES["score"])
    assert first.attended_keys == second.attended_keys
    assert (first.outcome, second.outcome) == ("not shown", "chosen")


@pytest.mark.parametrize(("size", "kv_heads"), [(1, 0), (16, 90), (32, 48)])
def test_the_page_of_a_server_and_the_heads_of_its_model_are_found(size, kv_heads):
    async def found(fake):
        async with Client(fake.url) as client:
            return await find_engine(client, prompts_of(2))

    with served(page_size=size, kv_heads=kv_heads, defaults={"star_block_size": 128}) as fake:
        assert asyncio.run(found(fake)) == (size, kv_heads)
    with served(starling=False) as fake, pytest.raises(ServerError, match="Starling is not activated"):
        asyncio.run(found(fake))
    with served(page_size=2000) as fake, pytest.raises(ServerError, match="did not engage"):
        asyncio.run(found(fake))


def test_dense_heads_are_found_without_being_told():
    """Star without dense heads loses one prompt in ten, and with a tenth of the heads none."""
    prompts = prompts_of(60)
    losers = {prompt.name for prompt in prompts[::10]}

    def answer(prompt: str, xargs: dict) -> str:
        loses = xargs["star"] == "on" and float(xargs.get("star_dense_heads", 0)) < 0.1
        return "no" if loses and prompt[:3] in losers else "yes"

    plans = [candidate.plan.name for candidate in default_candidates(prompts, 1, None, 90)]
    with served(answer=answer, kv_heads=90) as fake:
        tuning = search(fake, 60, 0.15, plans, kv_heads=90)
    assert tuning.chosen.candidate.plan.name == "n/16,H=0.1"
