"""`starling advise`: one command, with what it gains and costs."""

from __future__ import annotations

import asyncio
import json
import shlex
from types import SimpleNamespace

import pytest

from starling.config.entry import parse_config
from starling.lab.evaluation.commands.advise import LIMITS, advice, document_advice, measured_speed, measured_words, run
from starling.lab.evaluation.plans import parse_plan
from starling.lab.evaluation.tuning.candidates import Candidate, chosen_candidates
from starling.lab.evaluation.tuning.search_options import MEASURES
from starling.lab.evaluation.tuning.tune_report import Chosen, Closest, Loss, Word
from starling.lab.evaluation.tuning.tuner import Trial, Tuning
from tests.unit.lab.evaluation.fake_server import served


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


def loss(high: float) -> Loss:
    return Loss(mean=high / 2, low=0.0, high=high, prompts=10)


WORDS = {
    "careful": Word("careful", 1, closest=Closest(plan="n/4", loss=loss(0.03), prompts_needed=60)),
    "balanced": Word("balanced", 8, loss(0.03)),
    "fast": Word("fast", 16, loss(0.08)),
}


def test_a_plan_that_is_good_enough_is_a_command_with_its_gain_and_cost():
    lines = advice(report(0.02), WORDS, ["MODEL", "--block-size", "32"], "2.00 times sooner")
    command = shlex.split(lines[1])
    assert command == ["starling", "serve", "MODEL", "--block-size", "32", "--star", "auto", "--star-block-size", "n/8"]
    assert "the first token comes 2.00 times sooner; 31.0 % of dense's attention work" in lines[2]
    assert "are 2.0 % less probable on average, and at most 3.0 % less with a confidence of 95 % (10" in lines[3]
    assert "are 1.0 % more probable on average" in advice(report(-0.01), WORDS, ["MODEL"], "")[3]
    assert lines[5:] == [
        "  star_quality=fast: n/16, at most 8.0 % less probable, within its limit of 10 %",
        "  star_quality=careful: dense, since no plan is shown to be within its limit of 2 %; "
        "about 60 prompts may show n/4",
    ]


def test_texts_that_prompts_share_are_a_line_with_the_command_for_documents():
    def found(repeated: int) -> list[str]:
        shared = SimpleNamespace(prompts={"tokens": 40_000, "repeated_tokens": repeated})
        return document_advice(shared, ["MODEL", "--max-model-len", "8192"])

    says, command = found(18_000)
    assert "18,000 of the prompts' 40,000 tokens (45.0 %) are texts that an earlier prompt has too" in says
    assert command == "  starling serve MODEL --max-model-len 8192 --preset rag"
    assert found(3_000) == []


def tuning(plan: str, held_out: float, searched: float = 0.0) -> Tuning:
    """A search that found a plan, whose loss was the same on each held-out prompt."""
    trial = Trial(Candidate(parse_plan(plan), 0.5, {}), [searched] * 10)
    return Tuning([trial], trial, [held_out] * 10)


def test_each_word_is_the_cheapest_plan_within_its_limit():
    searches = {"careful": tuning("n/4", 0.01), "balanced": tuning("n/8", 0.04), "fast": tuning("n/16", 0.09)}
    words = measured_words(searches, MEASURES["logprob"])
    assert {word: found.num_blocks for word, found in words.items()} == {"careful": 4, "balanced": 8, "fast": 16}
    assert list(words) == [word for word, _ in sorted(LIMITS.items(), key=lambda item: item[1])]


@pytest.mark.parametrize(
    ("losses", "sizes"),
    [
        ((0.01, 0.06, 0.09), {"careful": 4, "balanced": 4, "fast": 16}),
        ((0.01, 0.04, 0.11), {"careful": 4, "balanced": 8, "fast": 8}),
        ((0.03, 0.04, 0.11), {"careful": 1, "balanced": 8, "fast": 8}),
        ((0.03, 0.06, 0.11), {"careful": 1, "balanced": 1, "fast": 1}),
        ((0.03, 0.06, 0.09), {"careful": 1, "balanced": 1, "fast": 16}),
    ],
)
def test_a_plan_that_held_out_prompts_do_not_confirm_gives_way_to_a_more_careful_one(losses, sizes):
    searches = {
        word: tuning(plan, lost) for word, plan, lost in zip(LIMITS, ("n/4", "n/8", "n/16"), losses, strict=True)
    }
    words = measured_words(searches, MEASURES["logprob"])
    assert {word: found.num_blocks for word, found in words.items()} == sizes
    assert [words[word].closest is not None for word in words] == [size == 1 for size in sizes.values()]


def test_a_server_that_starts_as_advised_has_the_words(tmp_path, capsys):
    prompts = tmp_path / "mine.jsonl"
    lines = [json.dumps({"prompt": f"{number} " + "word " * (200 + number)}) for number in range(24)]
    prompts.write_text("\n".join(lines), encoding="utf-8")

    def lost(prompt: str, xargs: dict) -> float:
        size = xargs["star_block_size"]  # n/16 is 62 to 64 tokens, n/8 125 to 128, n/4 250 to 257
        return 0.08 if size < 100 else 0.03 if size < 200 else 0.005

    with served(answer=lambda prompt, xargs: "abcdefgh", loss=lost) as server:
        for _ in range(2):  # the second one finds the answers of all three searches
            assert run(["--base-url", server.url, "--prompts", str(prompts), "--out", str(tmp_path / "out")]) == 0
            printed = capsys.readouterr().out
            assert "have been measured in this folder before" not in printed
    sizes = "--star-quality-sizes careful=n/4,balanced=n/8,fast=n/16"
    assert f"starling serve fake --star auto --star-min-tokens 1002 {sizes}" in printed.split("Advice:")[1]
    written = json.loads((tmp_path / "out" / "additional-config.json").read_text(encoding="utf-8"))
    config = parse_config(written)
    assert config is not None
    assert config.quality_sizes == {"fast": 16, "balanced": 8, "careful": 4}
    assert (config.star.mode, config.star.block_size) == ("auto", None)
    tuned = json.loads((tmp_path / "out" / "tune.json").read_text(encoding="utf-8"))
    assert {word: found["num_blocks"] for word, found in tuned["words"].items()} == config.quality_sizes
    assert all(0 < found["loss"]["mean"] <= LIMITS[word] / 100 for word, found in tuned["words"].items())


@pytest.mark.parametrize(("answer", "most"), [({"answer": "abcdefghij"}, 1), ({}, 8)])
def test_no_text_is_generated_that_is_not_compared(tmp_path, capsys, answer, most):
    """With an answer, each request is for one token; without, dense's tokens are those that are compared."""
    prompts, out = tmp_path / "mine.jsonl", str(tmp_path / "out")
    texts = [f"{number} {'word ' * 250}{'another text ' * 20}" for number in range(20)]
    prompts.write_text("\n".join(json.dumps({"prompt": text} | answer) for text in texts), encoding="utf-8")
    with served(answer=lambda prompt, xargs: "x" * 500, loss=lambda prompt, xargs: 0.0) as server:
        assert run(["--base-url", server.url, "--prompts", str(prompts), "--out", out]) == 0
    asked = [(body["max_tokens"], body.get("vllm_xargs", {}).get("star")) for body in server.completions]
    assert max(tokens for tokens, _ in asked) == most
    assert {star for tokens, star in asked if tokens > 1} <= {"off", None}
    says = "Or documents, if each is a message: "
    assert says in capsys.readouterr().out.splitlines()[-2]


def test_without_one_the_advice_is_dense():
    lines = advice(report(0.09), WORDS, ["MODEL"], "")
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


def test_times_that_are_no_better_are_no_gain():
    class Client:
        async def seconds_to_first_token(self, token_ids, plan):
            return 1.0

    text = asyncio.run(measured_speed(Client(), [SimpleNamespace(token_ids=[1])], parse_plan("n/8")))
    assert text.startswith("no sooner, so serve such prompts without star: 1.00 s dense, 1.00 s with star")


def test_a_plan_that_prompts_are_too_short_for_is_left_out():
    prompts = [SimpleNamespace(name=f"line {number}", token_ids=[number] * 600) for number in range(2)]
    assert [one.plan.name for one in chosen_candidates(["n/4", "n/8"], prompts, 128, leave_out=True)] == ["n/8"]
    with pytest.raises(ValueError, match=r"the prompts are too short for star blocks.*: line 0 has 600 tokens"):
        chosen_candidates(["n/2"], prompts, 128, leave_out=True)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompts", "nowhere.jsonl"], "either MODEL"),
        (["MODEL", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["MODEL", "--star-block-size", "512", "--prompts", "nowhere.jsonl"], "--star-block-size is refused"),
        (
            ["MODEL", "--star-quality-sizes", "x", "--prompts", "nowhere.jsonl"],
            "--star-quality-sizes is refused: the search chooses it. Allowed: none, or `starling tune --plan`",
        ),
        (
            ["MODEL", "--preset", "rag", "--prompts", "nowhere.jsonl"],
            "--preset rag is refused: its prompts are documents",
        ),
        (["MODEL", "--preset=long", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (
            ["MODEL", "--additional-config", '{"starling": {"star": "on"}}', "--prompts", "nowhere.jsonl"],
            "star in --additional-config is refused: the search chooses it",
        ),
        (["MODEL", "--additional-config={", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cant_be_measured_is_refused_before_a_server_starts(capsys, monkeypatch, tmp_path, argv, says):
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("starling advise: error: ")
    assert says in error
