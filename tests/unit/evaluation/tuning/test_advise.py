"""`starling advise`: one command, with what it gains and costs."""

from __future__ import annotations

import asyncio
import shlex
from types import SimpleNamespace

import pytest

from starling.evaluation.commands.advise import advice, measured_speed, run
from starling.evaluation.plans import parse_plan
from starling.evaluation.tuning.report import Chosen, Closest, Loss


def report(loss: float, budget: float = 0.05):
    confirmed = Loss(mean=loss, low=loss - 0.01, high=loss + 0.01, prompts=10)
    chosen = Chosen(
        plan="n/8",
        attended_keys=0.31,
        confirmed=confirmed,
        within_budget=confirmed.high <= budget,
        flags=["--star", "auto", "--star-block-size", "n/8"],
        additional_config={},
    )
    closest = Closest(plan="n/4", loss=confirmed, prompts_needed=None)
    return SimpleNamespace(chosen=chosen, closest=closest, succeeded=chosen.within_budget, budget=budget)


def test_a_plan_that_is_good_enough_is_a_command_with_its_gain_and_cost():
    lines = advice(report(0.02), ["MODEL", "--block-size", "32"], "2.00 times sooner")
    command = shlex.split(lines[1])
    assert command == ["starling", "serve", "MODEL", "--block-size", "32", "--star", "auto", "--star-block-size", "n/8"]
    assert "the first token comes 2.00 times sooner; 31.0 % of dense's attention work" in lines[2]
    assert "are 2.0 % less probable on average, and at most 3.0 % less with a confidence of 95 % (10" in lines[3]
    assert "are 1.0 % more probable on average" in advice(report(-0.01), ["MODEL"], "")[3]


def test_without_one_the_advice_is_dense():
    lines = advice(report(0.09), ["MODEL"], "")
    assert lines[0] == "Advice: serve without star, or accept a larger loss."
    assert lines[1].split() == ["starling", "serve", "MODEL"]
    assert "no plan is shown to keep the loss within 5 %. n/4 is the closest" in lines[2]


def test_the_longest_prompts_are_timed_in_turns():
    asked: list[tuple[int, str]] = []

    class Client:
        async def seconds_to_first_token(self, token_ids, plan):
            asked.append((len(token_ids), plan.name))
            return 3.0 if plan.is_dense else 1.5

    prompts = [SimpleNamespace(token_ids=[1] * length) for length in (100, 4000, 2000)]
    text = asyncio.run(measured_speed(Client(), prompts, parse_plan("n/8")))
    assert asked == [(length, plan) for length in (4000, 2000) for _ in range(2) for plan in ("dense", "n/8")]
    assert text.startswith("2.00 times sooner: 3.00 s dense, 1.50 s with star, for prompts of 2,000 to 4,000 tokens")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompts", "nowhere.jsonl"], "either MODEL"),
        (["MODEL", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["MODEL", "--star-block-size", "512", "--prompts", "nowhere.jsonl"], "--star-block-size is refused"),
        (["MODEL", "--budget", "0", "--prompts", "nowhere.jsonl"], "budget"),
    ],
)
def test_what_cant_be_measured_is_refused_before_a_server_starts(capsys, monkeypatch, tmp_path, argv, says):
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("starling advise: error: ")
    assert says in error
