"""`starling tune` as a user runs it, against a server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest
from rich.progress import Progress

from starling.config.entry import parse_config
from starling.engine_ext.serving.cli.main import main
from starling.engine_ext.serving.cli.serve_args import parse as parse_serve
from starling.lab.command_line import given_options
from starling.lab.evaluation import server_process
from starling.lab.evaluation.commands import measuring
from starling.lab.evaluation.commands import tune as cli
from starling.lab.evaluation.prompt_options import parse_options
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.tuning.search_options import MEASURES, TuneOptions
from starling.lab.evaluation.tuning.tune_report import TuneReport
from starling.lab.evaluation.tuning.tuner import halves
from tests.unit.lab.evaluation.eval_runs import Page
from tests.unit.lab.evaluation.fake_server import served

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture
def own(tmp_path) -> Path:
    """A file of 40 prompts of 2,000 to 2,039 tokens, and one of them twice."""
    file = tmp_path / "own.jsonl"
    lines = [{"prompt": f"{number:03}" + "x" * (1997 + number), "answer": "yes"} for number in range(40)]
    file.write_text("\n".join(map(json.dumps, [*lines, lines[0]])))
    return file


def loses_by_blocks(prompt: str, xargs: dict) -> float:
    """A token is 0.5 nats less probable with blocks below 300 tokens, and 0.01 with larger ones."""
    return 0.5 if xargs["star_block_size"] < 300 else 0.01


def tune(fake, out: Path, file: Path, *options: str) -> int:
    return cli.run(["--base-url", fake.url, "--prompts", str(file), *options, "--out", str(out)])


def read(out: Path) -> TuneReport:
    return TuneReport.model_validate_json((out / "tune.json").read_text())


LOGPROB = ("--measure", "logprob", "--logprobs", "1", "--budget", "5")


def test_a_plan_is_found_and_written_for_a_server(tmp_path, capsys, own):
    out = tmp_path / "out"
    with served(loss=loses_by_blocks, page_size=16) as fake:
        assert tune(fake, out, own, *LOGPROB) == 0
    output, report = capsys.readouterr().out, read(out)
    counts = {"searched": 20, "held_out": 20, "equal_to_others": 1, "shortest": 2000, "longest": 2039}
    tokens = sum(range(2000, 2040))
    assert report.prompts.items() >= (counts | {"tokens": tokens}).items()
    assert tokens - 3000 < report.prompts["repeated_tokens"] < tokens - 2000, "all but the first prompt and the numbers"
    assert (report.page_size, report.server["model"], report.chosen.plan) == (16, "fake", "n/4")
    assert report.chosen.confirmed.prompts == 20 and 0 < report.chosen.confirmed.high <= 0.05
    outcomes = {row.plan: row.outcome for row in report.candidates}
    assert [outcomes[plan] for plan in ("n/4", "n/8,O=0", "n/3,O=0")] == ["chosen", "dropped", "not needed"]
    assert [row.attended_keys for row in report.candidates] == sorted(row.attended_keys for row in report.candidates)
    options = {"star": "auto", "star_min_tokens": 2000, "star_block_size": "n/4"}
    config = json.loads((out / "additional-config.json").read_text())
    assert config == report.chosen.additional_config == {"starling": options}
    assert parse_config(config).star.block_size == "n/4"
    served_by_flags, _ = parse_serve(["fake", *report.chosen.flags])
    assert served_by_flags.additional_config == config
    flags = "--star auto --star-min-tokens 2000 --star-block-size n/4"
    assert f"starling serve fake {flags}\n" in output
    assert "within the budget of 5, with a confidence of 95 %" in output
    assert f"attends to {100 * report.chosen.attended_keys:.1f} % of the keys that dense attends to" in output
    assert "dropped after 8 prompts: it loses at least" in output
    assert "loses much more, and is at most 14.3 % of all prompts, may not be among these" in output


@pytest.mark.parametrize("given", [["--star-heads", "scores.json"], ["--star_heads=scores.json"]], ids=" ".join)
def test_the_scores_of_the_search_are_those_of_the_server_that_follows(tmp_path, capsys, own, monkeypatch, given):
    """Their file is named whole: the server may start in another folder."""
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    with served(loss=loses_by_blocks, page_size=16) as fake:
        monkeypatch.setattr(
            "starling.lab.evaluation.commands.measuring.served", lambda *_: contextlib.nullcontext(fake.url)
        )
        assert cli.run(["fake", "--prompts", str(own), *LOGPROB, "--plan", "n/4", "--out", str(out), *given]) == 0
    config = json.loads((out / "additional-config.json").read_text())
    assert config["starling"]["star_heads"] == str(tmp_path / "scores.json")
    assert f"starling serve fake {' '.join(given)} --star auto" in capsys.readouterr().out


def test_a_second_run_asks_nothing_again_and_another_budget_uses_the_answers(tmp_path, capsys, own):
    out = tmp_path / "out"
    with served(loss=loses_by_blocks, page_size=16) as fake:
        assert tune(fake, out, own, *LOGPROB) == 0
        first, asked = read(out), len(fake.completions)
        assert tune(fake, out, own, *LOGPROB) == 0
        assert len(fake.completions) == asked + 3, "the probes for Starling, for the page and for dense heads"
        assert "answers in" in capsys.readouterr().out
        assert read(out).candidates == first.candidates and read(out).chosen == first.chosen
        assert tune(fake, out, own, *LOGPROB, "--budget", "60") == 0
        assert read(out).chosen.attended_keys < first.chosen.attended_keys
        assert (first.looked_at, read(out).looked_at) == ([], ["n/4"])
        warning = "Warning: held-out prompts have been measured in this folder before, under n/4. If those"
        assert warning in capsys.readouterr().out
        assert tune(fake, out, own, *LOGPROB, "--plan", "B=n/4") == 0
        assert first.chosen.plan not in read(out).looked_at and len(read(out).looked_at) == 1
    with served(models=("other",)) as fake:
        assert tune(fake, out, own, *LOGPROB) == 2
    assert "model was 'fake' and is 'other'" in capsys.readouterr().err


def test_a_run_that_failed_goes_on_and_finds_the_same(tmp_path, capsys, own):
    asked = []

    def fail(body: dict) -> tuple[int, str] | None:
        asked.append(body)
        return (500, "gone") if len(asked) > 100 else None

    with served(loss=loses_by_blocks, page_size=16, fail=fail) as fake:
        assert tune(fake, tmp_path / "out", own, *LOGPROB) == 1
        assert "the same command goes on from there" in capsys.readouterr().err
        fake.fail = lambda body: None
        assert tune(fake, tmp_path / "out", own, *LOGPROB) == 0
        assert tune(fake, tmp_path / "whole", own, *LOGPROB) == 0
    assert read(tmp_path / "out").candidates == read(tmp_path / "whole").candidates
    assert read(tmp_path / "out").chosen == read(tmp_path / "whole").chosen


def test_where_no_plan_is_within_the_budget(tmp_path, capsys, own):
    out = tmp_path / "out"
    with served(loss=loses_by_blocks, page_size=16) as fake:
        assert tune(fake, out, own, *LOGPROB) == 0
        capsys.readouterr()
        assert tune(fake, out, own, *LOGPROB, "--budget", "0.5") == 3
    output, report = capsys.readouterr().out, read(out)
    assert not (out / "additional-config.json").exists(), "that of another budget is gone"
    assert report.chosen is None and report.closest.loss.mean == pytest.approx(0.01)
    assert "No candidate is shown to be within the budget of 0.5" in output
    assert re.search(r"is the closest: it loses \+1\.0 \[\+0\.\d, \+1\.0\] points of logprob on 8 prompts", output)
    assert "More prompts would not show it" in output and "starling serve" not in output


def test_a_plan_that_is_not_confirmed_is_no_result(tmp_path, capsys, own):
    """Only the held-out prompts lose, one of them everything."""
    texts = [json.loads(line)["prompt"] for line in own.read_text().splitlines()[:40]]
    prompts = [Prompt(text, "prompts", None, tuple(map(ord, text)), "", (), "all", (), 1) for text in texts]
    loser = halves(prompts)[1][0].name
    with served(answer=lambda prompt, xargs: "no" if prompt == loser and xargs["star"] == "on" else "yes") as fake:
        assert tune(fake, tmp_path / "out", own, "--budget", "17", "--plan", "n/4") == 3
    report, output = read(tmp_path / "out"), capsys.readouterr().out
    assert (report.chosen.plan, report.chosen.within_budget) == ("n/4", False)
    assert report.chosen.confirmed.mean == pytest.approx(1 / 20)
    assert report.closest.prompts_needed > 40
    assert "not confirmed by the held-out prompts" in output
    assert f"About {report.closest.prompts_needed} prompts would show it" in output
    assert not (tmp_path / "out" / "additional-config.json").exists()


def test_the_page_escapes_texts_and_loads_nothing(tmp_path, own):
    with served(loss=loses_by_blocks, models=("<b>model</b>",)) as fake:
        assert tune(fake, tmp_path / "out", own, *LOGPROB) == 0
    page = Page((tmp_path / "out" / "tune.html").read_text())
    assert "b" not in page.tags and "script" not in page.tags and page.loads == []
    text = "".join(page.text)
    assert "<b>model</b>" in text and "--star-block-size" in text and "--measure logprob --logprobs 1" in text


def test_tasks_are_tuned_on_too(tmp_path, capsys):
    tasks = ("--tasks", "niah_single_1,vt", "--lengths", "2000", "--prompts-per-cell", "10")
    with served(answer=lambda prompt, xargs: "nothing") as fake:
        arguments = ["--base-url", fake.url, *tasks, "--budget", "30", "--plan", "n/8", "--out", str(tmp_path)]
        assert cli.run(arguments) == 0
    assert "may not be among these" not in capsys.readouterr().out, "a score has a largest loss"
    assert read(tmp_path).prompts["searched"] == read(tmp_path).prompts["held_out"] == 10


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tasks", "vt", "--budget", "2"), "Needed: at least 298 prompts (--prompts-per-cell 298)"),
        (("--tasks", "vt", "--budget", "2"), "Or: --budget 27.3 or more, or --measure logprob, which needs 20"),
        (("--tasks", "vt,moves", "--budget", "2"), "(--prompts-per-cell 149)"),
        (("--tasks", "vt", "--budget", "2", "--prompts-per-cell", "1"), "Or: a larger budget"),
        (("--tasks", "vt", "--budget", "2", "--measure", "logprob", "--prompts-per-cell", "19"), "20 are needed"),
        (("--tasks", "vt", "--budget", "0"), "budget=0.0 is refused"),
        (("--tasks", "vt", "--budget", "100"), "budget=100.0 is refused"),
        (("--tasks", "vt", "--budget", "50", "--plan", "default"), "plan='default' is refused: it has no sizes"),
        (("--tasks", "vt", "--budget", "50", "--plan", "dense"), "plan='dense' is refused"),
        (("--tasks", "vt", "--budget", "50", "--plan", "n/4", "--plan", "n/4"), "it is given twice"),
        (("--tasks", "vt", "--budget", "50", "--plan", "n/4", "--query-tokens", "9"), "write Q into the plans"),
        (("--tasks", "vt", "--budget", "50", "--logprobs", "9"), "it has no effect with --measure score"),
        (("--budget", "2"), "either --tasks or --prompts is needed"),
        (("--tasks", "vt", "--budget", "50", "--star", "on"), "--star is refused: the search chooses it"),
        (("--tasks", "vt", "--budget", "50", "--star_block_size=64"), "--star_block_size=64 is refused"),
        (("--tasks", "vt", "--budget", "50", "--port", "1"), "--port is refused"),
        (
            ("--tasks", "vt", "--budget", "50", "--measure", "logprob", "--max-tokens", "9"),
            "max_tokens=9 is refused: it has no effect with --measure logprob",
        ),
    ],
)
def test_unusable_arguments_are_refused_before_a_server_starts(tmp_path, capsys, monkeypatch, options, reason):
    monkeypatch.setattr(server_process.sys, "executable", "/bin/false")
    assert main(["tune", "some/model", *options, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("starling tune: error: ") and reason in error


@pytest.mark.parametrize("number", [5, 20, 43, 297])
def test_what_a_refusal_names_is_accepted(own, number):
    """The number of prompts, to the last one, and the budget."""

    def options(number: int, budget: float) -> TuneOptions:
        own.write_text("\n".join(json.dumps({"prompt": f"{index}"}) for index in range(number)))
        return TuneOptions(prompts=own, budget=budget)

    with pytest.raises(ValueError, match="at least 298 prompts") as refused:
        options(number, 2).check()
    options(298, 2).check()
    named = re.search(r"--budget ([\d.]+) or more", str(refused.value))
    if named is None:
        assert number == 5, "no budget below 100 allows so few"
    else:
        options(number, float(named[1])).check()
        with pytest.raises(ValueError, match="is refused"):
            options(number, float(named[1]) - 0.11).check()


@pytest.mark.parametrize(
    ("settings", "plan", "code", "reason"),
    [
        ({"starling": False, "tokenizes": True}, "n/4", 1, "plan='n/4' is refused: Starling is not activated"),
        ({"defaults": {"star_overlap_size": 8}}, "n/4", 1, "the server's own star options or its replicas change it"),
        ({}, "n/4,A=600", 2, "plan='n/4,A=600' is refused: the prompt line 1, of 2000 tokens, can't have it"),
        ({}, "B=1600", 2, "would be dense with it"),
    ],
)
def test_what_a_server_or_a_prompt_can_not_do(tmp_path, capsys, own, settings, plan, code, reason):
    with served(**settings) as fake:
        assert tune(fake, tmp_path / "out", own, *LOGPROB, "--plan", plan) == code
    assert reason in capsys.readouterr().err


def test_the_command_of_a_report_repeats_the_search(tmp_path, own):
    options = ("--measure", "logprob", "--budget", "5", "--logprobs", "2", "--query-tokens", "50")
    with served() as fake:
        tune(fake, tmp_path / "out", own, *options)
        first = read(tmp_path / "out")
        command, subcommand, *arguments = shlex.split(first.command)
        arguments[arguments.index("DIR")] = str(tmp_path / "again")
        assert (command, subcommand, main([subcommand, *arguments])) == ("starling", "tune", 3)
    again = read(tmp_path / "again")
    assert again.candidates == first.candidates and again.command == first.command
    assert all(row.plan.endswith(",Q=50") for row in again.candidates)


def test_help_and_the_page_name_every_option(capsys):
    page = (Path(__file__).parents[5] / "docs" / "tune.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    printed = capsys.readouterr().out
    options = [name for action in cli.make_parser()._actions for name in action.option_strings if name[:2] == "--"]
    assert len(options) > 15
    assert [name for name in options if name not in printed] == []
    assert [name for name in options if f"`{name}`" not in page and name != "--help"] == []
    assert all(f"`{name}`" in page for name in MEASURES)


def test_one_bar_for_all_searches_goes_forward_and_ends_where_nothing_is_left(tmp_path, own):
    """Its total falls with what is not needed, and never rises."""
    states = []

    class Watched(Progress):
        def refresh(self) -> None:
            states.extend((task.total, task.completed) for task in self.tasks if task.description == "answers, at most")

        def advance(self, task_id, advance=1) -> None:
            super().advance(task_id, advance)
            self.refresh()

        def update(self, task_id, **fields) -> None:
            super().update(task_id, **fields)
            self.refresh()

    args = cli.make_parser().parse_args(["--prompts", str(own), *LOGPROB, "--out", str(tmp_path / "out")])
    options = parse_options(TuneOptions, given_options(args, TuneOptions))

    async def searched(fake, monkey):
        args.base_url = fake.url
        monkey.setattr(measuring, "progress_bars", lambda console: Watched(disable=True))
        return await cli.search(args, options, ["--base-url", fake.url], measuring.make_console(), [0.02, 0.05, 0.6])

    with served(loss=loses_by_blocks, page_size=16) as fake, pytest.MonkeyPatch.context() as monkey:
        found = asyncio.run(searched(fake, monkey))
    assert len(found.tunings) == 3
    totals, completed = zip(*states, strict=True)
    assert list(totals) == sorted(totals, reverse=True) and list(completed) == sorted(completed)
    assert all(done <= total for total, done in states)
    assert completed[-1] > 40
