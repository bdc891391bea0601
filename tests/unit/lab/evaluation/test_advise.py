"""`starling advise`: one command, with what it gains and costs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from starling.config.entry import parse_config
from starling.engine_ext.serving.cli.main import main
from starling.engine_ext.serving.cli.serve_args import parse as parse_serve
from starling.lab.evaluation import server_process
from starling.lab.evaluation.advice import (
    LIMITS,
    Advice,
    Candidate,
    CandidateResult,
    Closest,
    Loss,
    Word,
    advice_lines,
    document_lines,
    find_words,
    halves,
)
from starling.lab.evaluation.commands.advise import make_parser, measured_speed, run
from starling.lab.evaluation.prompt_options import parse_plan
from starling.lab.evaluation.prompts import Prompt
from tests.unit.lab.evaluation.fake_server import served

pytestmark = pytest.mark.usefixtures("surroundings")


def loss(mean: float, high: float) -> Loss:
    return Loss(mean=mean, low=mean - 0.01, high=high, prompts=10)


CAREFUL = Word(limit="careful", num_blocks=1, closest=Closest(plan="n/4", loss=loss(0.01, 0.03), prompts_needed=60))


def advice(mean: float, balanced: Word | None = None, **prompts: int) -> SimpleNamespace:
    found = balanced or Word(limit="balanced", num_blocks=8, loss=loss(mean, mean + 0.01))
    words = {"careful": CAREFUL, "balanced": found, "fast": Word(limit="fast", num_blocks=16, loss=loss(0.05, 0.08))}
    row = CandidateResult(plan="n/8", attended_keys=0.31, searched=loss(0, 0), held_out=None)
    return SimpleNamespace(words=words, candidates=[row], flags=["--star", "auto"], prompts=prompts)


def test_a_plan_that_is_good_enough_is_a_command_with_its_gain_and_cost():
    lines = advice_lines(advice(0.02), ["MODEL", "--block-size", "32"], "2.00 times sooner")
    assert shlex.split(lines[1]) == ["starling", "serve", "MODEL", "--block-size", "32", "--star", "auto"]
    assert "the first token comes 2.00 times sooner; 31.0 % of dense's attention work" in lines[2]
    assert "are 2.0 % less probable on average, and at most 3.0 % less with a confidence of 95 % (10" in lines[3]
    assert "loses much more, and is at most 27.3 % of all, may not be among these" in lines[3]
    assert "are 1.0 % more probable on average" in advice_lines(advice(-0.01), ["MODEL"], "")[3]
    assert lines[5:] == [
        "  star_quality=fast: n/16, at most 8.0 % less probable, within its limit of 10 %",
        "  star_quality=careful: dense, since no plan is shown to be within its limit of 2 %; "
        "about 60 prompts may show n/4",
    ]


def test_without_one_the_advice_is_dense():
    lines = advice_lines(advice(0, CAREFUL), ["MODEL"], "")
    assert lines[0] == "Advice: serve without star, or accept a larger loss."
    assert lines[1].split() == ["starling", "serve", "MODEL"]
    assert "no plan is shown to keep the loss within 5 %. n/4 is the closest: +1.0 [" in lines[2]


def test_texts_that_prompts_share_are_a_line_with_the_command_for_documents():
    served_with = ["MODEL", "--max-model-len", "8192"]
    says, command = document_lines(advice(0, tokens=40_000, repeated_tokens=18_000), served_with)
    assert "18,000 of the prompts' 40,000 tokens (45.0 %) are texts that an earlier prompt has too" in says
    assert command == "  starling serve MODEL --max-model-len 8192 --preset rag"
    assert document_lines(advice(0, tokens=40_000, repeated_tokens=3_000), served_with) == []


def test_each_word_is_the_cheapest_plan_within_its_limit():
    losses = {16: 0.09, 8: 0.04, 4: 0.01}
    words = find_words([Candidate(number, [lost] * 10, [lost] * 10) for number, lost in losses.items()])
    assert {word: found.num_blocks for word, found in words.items()} == {"careful": 4, "balanced": 8, "fast": 16}
    assert list(words) == [word for word, _ in sorted(LIMITS.items(), key=lambda item: item[1])]


@pytest.mark.parametrize(
    ("held_out", "sizes"),
    [
        ((0.01, 0.06, 0.09), {"careful": 4, "balanced": 4, "fast": 16}),
        ((0.01, 0.04, 0.11), {"careful": 4, "balanced": 8, "fast": 8}),
        ((0.03, 0.04, 0.11), {"careful": 1, "balanced": 8, "fast": 8}),
        ((0.03, 0.06, 0.11), {"careful": 1, "balanced": 1, "fast": 1}),
        ((0.03, 0.06, 0.09), {"careful": 1, "balanced": 1, "fast": 16}),
    ],
)
def test_a_plan_that_held_out_prompts_do_not_confirm_gives_way_to_a_more_careful_one(held_out, sizes):
    """No second plan is tried on the held-out prompts."""
    candidates = [
        Candidate(number, [searched] * 10, [lost] * 10)
        for number, searched, lost in zip((4, 8, 16), (0.01, 0.04, 0.09), held_out, strict=True)
    ]
    words = find_words(candidates[::-1])
    assert {word: found.num_blocks for word, found in words.items()} == sizes
    assert [words[word].closest is not None for word in words] == [size == 1 for size in sizes.values()]
    for word, lost in zip(LIMITS, held_out, strict=True):
        if words[word].closest is not None:
            assert words[word].closest.loss.mean == pytest.approx(lost)


def test_where_no_plan_is_chosen_the_closest_loses_least_and_a_stricter_limit_needs_more_prompts():
    uneven = [0.0] * 9 + [0.19]
    words = find_words([Candidate(16, [0.3] * 10), Candidate(4, uneven, uneven)])
    closest = [words[word].closest for word in ("careful", "balanced")]
    assert [found.plan for found in closest] == ["n/4", "n/4"]
    assert closest[0].prompts_needed > closest[1].prompts_needed > 20


def test_a_half_is_a_matter_of_the_prompt_and_not_of_its_place():
    prompts = [Prompt(str(n), "prompts", None, (n,) * 9, "", (), "all", (), 1) for n in range(41)]
    one, other = halves(prompts), halves(prompts[::-1])
    assert one == other and sorted(map(len, one)) == [20, 21]
    assert {prompt.name for half in one for prompt in half} == {prompt.name for prompt in prompts}


@pytest.fixture
def own(tmp_path) -> Path:
    """A file of 24 prompts of 1,002 to 1,118 tokens, and one of them twice."""
    file = tmp_path / "mine.jsonl"
    lines = [json.dumps({"prompt": f"{number} " + "word " * (200 + number)}) for number in range(24)]
    file.write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    return file


def by_size(prompt: str, xargs: dict) -> float:
    size = xargs["star_block_size"]  # n/16 is 63 to 70 tokens, n/8 126 to 140, n/4 251 to 280
    return 0.08 if size < 100 else 0.03 if size < 200 else 0.005


def serving(**settings):
    """A server with answers of eight tokens."""
    return served(**{"answer": lambda prompt, xargs: "abcdefgh", "loss": by_size} | settings)


def advise(fake, own: Path, out: Path) -> int:
    return run(["--base-url", fake.url, "--prompts", str(own), "--out", str(out)])


def read(out: Path) -> Advice:
    return Advice.model_validate_json((out / "advice.json").read_text(encoding="utf-8"))


def test_a_server_that_starts_as_advised_has_the_words(tmp_path, capsys, own):
    with serving() as server:
        assert advise(server, own, tmp_path) == 0
        printed, first = capsys.readouterr().out, read(tmp_path)
        asked = len(server.completions)
        assert advise(server, own, tmp_path) == 0
        assert len(server.completions) - asked == 2 + 3 + 8, "is Starling there, each plan's probe, and the times"
        assert "found 96 answers in" in capsys.readouterr().out
    assert (read(tmp_path).candidates, read(tmp_path).words) == (first.candidates, first.words)
    sizes = "--star-quality-sizes careful=n/4,balanced=n/8,fast=n/16"
    assert f"starling serve fake --star auto --star-min-tokens 1002 {sizes}\n" in printed
    counts = {"searched": 12, "held_out": 12, "equal_to_others": 1, "shortest": 1002, "longest": 1118}
    assert first.prompts.items() >= counts.items()
    written = json.loads((tmp_path / "additional-config.json").read_text(encoding="utf-8"))
    by_flags, _ = parse_serve(["fake", *first.flags])
    config = parse_config(written)
    assert written == first.additional_config and parse_config(by_flags.additional_config) == config
    assert config.quality_sizes == {"fast": 16, "balanced": 8, "careful": 4}
    assert (config.star.mode, config.star.block_size) == ("auto", None)
    assert {word: found.num_blocks for word, found in first.words.items()} == config.quality_sizes
    assert all(0 < found.loss.mean <= LIMITS[word] / 100 for word, found in first.words.items())
    assert [row.plan for row in first.candidates] == ["n/16", "n/8", "n/4"]
    keys = [row.attended_keys for row in first.candidates]
    assert keys == sorted(keys) and keys[0] > 0 and keys[-1] < 1


def test_nothing_is_measured_that_costs_more_than_what_is_good_enough(tmp_path, capsys, own):
    with serving(loss=lambda prompt, xargs: 0.001) as server:
        assert advise(server, own, tmp_path) == 0
    assert [row.plan for row in read(tmp_path).candidates] == ["n/16"]
    assert "careful=n/16,balanced=n/16,fast=n/16" in capsys.readouterr().out


def test_where_no_plan_is_good_enough_the_options_of_an_earlier_run_go(tmp_path, capsys, own):
    with serving() as server:
        assert advise(server, own, tmp_path) == 0
        assert (tmp_path / "additional-config.json").exists()
        (tmp_path / "results.jsonl").unlink()
        server.loss = lambda prompt, xargs: 0.3
        assert advise(server, own, tmp_path) == 3
    assert not (tmp_path / "additional-config.json").exists()
    assert read(tmp_path).flags == [] and {found.num_blocks for found in read(tmp_path).words.values()} == {1}
    assert "Advice: serve without star" in capsys.readouterr().out


def test_a_run_that_failed_goes_on_and_finds_the_same(tmp_path, capsys, own):
    asked = []

    def fail(body: dict) -> tuple[int, str] | None:
        asked.append(body)
        return (500, "gone") if len(asked) > 100 else None

    with serving(fail=fail) as fake:
        assert advise(fake, own, tmp_path / "out") == 1
        assert "the same command goes on from there" in capsys.readouterr().err
        fake.fail = lambda body: None
        assert advise(fake, own, tmp_path / "out") == 0
        assert advise(fake, own, tmp_path / "whole") == 0
    assert read(tmp_path / "out").words == read(tmp_path / "whole").words


def test_answers_of_a_server_with_other_options_are_not_used(tmp_path, capsys, own, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving() as fake:
        monkeypatch.setattr(
            "starling.lab.evaluation.commands.measuring.served", lambda *_: contextlib.nullcontext(fake.url)
        )
        assert run(["fake", "--prompts", str(own)]) == 0
        assert run(["fake", "--prompts", str(own), "--dtype", "float16"]) == 2
    assert "server_options was [] and is ['--dtype', 'float16']" in capsys.readouterr().err


def test_a_key_is_not_shown(tmp_path, capsys, own):
    assert run(["--base-url", "http://localhost:1", "--prompts", str(own), "--hf-token=sk-1"]) == 2
    error = capsys.readouterr().err
    assert "unknown options: --hf-token=..." in error and "sk-1" not in error


def test_the_command_of_the_results_repeats_them(tmp_path, own):
    with serving() as fake:
        assert advise(fake, own, tmp_path / "out") == 0
        command, subcommand, *arguments = shlex.split(read(tmp_path / "out").command)
        arguments[arguments.index("DIR")] = str(tmp_path / "again")
        assert (command, main([subcommand, *arguments])) == ("starling", 0)
    assert read(tmp_path / "again").words == read(tmp_path / "out").words


@pytest.mark.parametrize("given", [["--star-heads", "scores.json"], ["--star_heads=scores.json"]], ids=" ".join)
def test_the_scores_of_the_measured_server_are_those_of_the_one_that_follows(tmp_path, capsys, own, monkeypatch, given):
    """Their file is named whole: the server may start in another folder."""
    monkeypatch.chdir(tmp_path)
    with serving() as fake:
        monkeypatch.setattr(
            "starling.lab.evaluation.commands.measuring.served", lambda *_: contextlib.nullcontext(fake.url)
        )
        assert run(["fake", "--prompts", str(own), *given]) == 0
    config = json.loads((tmp_path / "advice" / "additional-config.json").read_text())
    assert config["starling"]["star_heads"] == str(tmp_path / "scores.json")
    assert f"starling serve fake {' '.join(given)} --star auto" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "most"), [({"answer": "abcdefghij"}, 1), ({}, 8)])
def test_no_text_is_generated_that_is_not_compared(tmp_path, capsys, answer, most):
    """With an answer, each request is for one token; without, dense's tokens are those that are compared."""
    prompts, out = tmp_path / "mine.jsonl", str(tmp_path / "out")
    texts = [f"{number} {'word ' * 250}{'another text ' * 20}" for number in range(20)]
    prompts.write_text("\n".join(json.dumps({"prompt": text} | answer) for text in texts), encoding="utf-8")
    with serving(answer=lambda prompt, xargs: "x" * 500, loss=lambda prompt, xargs: 0.0) as server:
        assert run(["--base-url", server.url, "--prompts", str(prompts), "--out", out]) == 0
    asked = [(body["max_tokens"], body.get("vllm_xargs", {}).get("star")) for body in server.completions]
    assert max(tokens for tokens, _ in asked) == most
    assert {star for tokens, star in asked if tokens > 1} <= {"off", None}
    says = "Or documents, if each is a message: "
    assert says in capsys.readouterr().out.splitlines()[-2]


def test_the_longest_prompts_are_timed_in_turns():
    asked: list[tuple[int, str]] = []

    class Client:
        async def seconds_to_first_token(self, token_ids, plan):
            asked.append((len(token_ids), plan.name))
            return 3.0 if plan.is_dense else 1.5

    prompts = [SimpleNamespace(token_ids=[1] * length) for length in (100, 4000, 2000)]
    text, pays = asyncio.run(measured_speed(Client(), prompts, parse_plan("n/8")))
    assert pays and asked == [(length, plan) for length in (4000, 2000) for _ in range(2) for plan in ("dense", "n/8")]
    assert text.startswith("2.00 times sooner: 3.00 s dense, 1.50 s with star, for prompts of 2,000 to 4,000 tokens")


def test_times_that_are_no_better_are_no_gain():
    class Client:
        async def seconds_to_first_token(self, token_ids, plan):
            return 1.0

    text, pays = asyncio.run(measured_speed(Client(), [SimpleNamespace(token_ids=[1])], parse_plan("n/8")))
    assert text.startswith("no sooner: 1.00 s dense, 1.00 s with star")
    first = advice_lines(advice(0.02), ["MODEL"], text, pays=pays)[0]
    assert first == "Advice, for longer prompts than these, which star makes no faster:"


@pytest.mark.parametrize(("page_size", "plans"), [(64, ["n/16", "n/8"]), (128, ["n/8"]), (256, []), (600, [])])
def test_plans_that_prompts_are_too_short_for_are_left_out(tmp_path, capsys, own, page_size, plans):
    """The context of the shortest prompt has 501 tokens. Of plans with blocks of one size, that with the fewest counts.

    Two blocks with an overlap attend to all that dense attention does: so would n/4, in pages of 64 tokens or more.
    """
    with serving(page_size=page_size, loss=lambda prompt, xargs: 0.3) as server:
        code = advise(server, own, tmp_path)
    if plans:
        assert code == 3 and [row.plan for row in read(tmp_path).candidates] == plans
    else:
        assert code == 2
        assert "too short for star blocks of whole pages: line 1 has 1002 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "code", "reason"),
    [
        ({"starling": False}, 1, "plan='n/16' is refused: Starling is not activated"),
        ({"raw_logprobs": False}, 1, "--logprobs-mode raw_logprobs"),
        ({"models": ("one", "two")}, 1, "the server has several models"),
    ],
)
def test_what_a_server_can_not_do(tmp_path, capsys, own, settings, code, reason):
    with serving(**settings) as fake:
        assert advise(fake, own, tmp_path / "out") == code
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompts", "many.jsonl"], "either MODEL"),
        (["MODEL", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["MODEL", "--prompts", "few.jsonl"], "3 different prompts are too few for an interval: 20 are needed"),
        (["MODEL", "--port", "1", "--prompts", "many.jsonl"], "--port is refused"),
        (["MODEL", "--star-block-size", "512", "--prompts", "many.jsonl"], "--star-block-size is refused"),
        (["MODEL", "--star_block_size=64", "--prompts", "many.jsonl"], "--star_block_size=64 is refused"),
        (
            ["MODEL", "--star-quality-sizes", "x", "--prompts", "many.jsonl"],
            "--star-quality-sizes is refused: it is what is measured",
        ),
        (["MODEL", "--preset", "rag", "--prompts", "many.jsonl"], "--preset rag is refused: it says how prompts are"),
        (["MODEL", "--preset=long", "--prompts", "many.jsonl"], "--preset long is refused: it says how prompts are"),
        (
            ["MODEL", "--additional-config", '{"starling": {"preset": "rag"}}', "--prompts", "many.jsonl"],
            "preset in --additional-config is refused",
        ),
        (["MODEL", "--api-key", "sk-1", "--prompts", "many.jsonl"], "--api-key goes with --base-url"),
        (
            ["MODEL", "--additional-config", '{"starling": {"star": "on"}}', "--prompts", "many.jsonl"],
            "star in --additional-config is refused: it is what is measured",
        ),
        (["MODEL", "--additional-config={", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cant_be_measured_is_refused_before_a_server_starts(capsys, monkeypatch, tmp_path, argv, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server_process.sys, "executable", "/bin/false")
    for name, number in (("few", 3), ("many", 20)):
        Path(f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": str(one)}) for one in range(number)))
    assert main(["advise", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("starling advise: error: ")
    assert says in error


def test_the_page_names_every_option():
    page = (Path(__file__).parents[4] / "docs" / "advise.md").read_text(encoding="utf-8")
    options = [name for action in make_parser()._actions for name in action.option_strings if name[:2] == "--"]
    assert [name for name in options if f"`{name}`" not in page and name != "--help"] == []
