"""Scores by thirds of the depth, against values worked out by hand."""

from __future__ import annotations

import pytest

from starling.lab.evaluation.comparison import THIRDS, compare, compare_depths, make_pairs, third
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.report import Report, depth_rows, html_report, terminal_tables
from starling.lab.evaluation.store import Answer, TokenScore
from starling.lab.statistics import Interval, bootstrap


def prompt(name: str, depth: float | None, length: int = 10) -> Prompt:
    return Prompt(name, "code", length, (1, 2), "", ("yes",), "all", (5,), 4, depth)


def answer(name: str, plan: str, text: str, logprob: float | None = None) -> Answer:
    scores = [] if logprob is None else [TokenScore(logprob=logprob, top={1: logprob})]
    fields = {"finish_reason": "stop", "token_ids": [5], "server_plan": None, "scores": scores}
    return Answer(key=f"{name} {plan}", prompt=name, plan=plan, text=text, **fields)


DEPTHS = {"a": 0.0, "b": 0.32, "c": 0.34, "d": 0.99, "e": None}
PROMPTS = [prompt(name, depth) for name, depth in DEPTHS.items()]
STAR = {"a": "yes", "b": "no", "c": "yes", "d": "no", "e": "no"}
ANSWERS = [answer(name, "dense", "yes", -1.0) for name in STAR]
ANSWERS += [answer(name, "n/4", text, -1.5) for name, text in STAR.items()]


@pytest.mark.parametrize(
    ("depth", "index"), [(0.0, 0), (0.33, 0), (0.34, 1), (0.66, 1), (0.67, 2), (0.999, 2), (1.0, 2)]
)
def test_thirds(depth, index):
    assert third(depth) == index


def test_each_third_pairs_its_prompts_with_dense():
    first, second, last = compare_depths(make_pairs(PROMPTS, ANSWERS))
    assert [(cell.depth, cell.prompts) for cell in (first, second, last)] == list(zip(THIRDS, (2, 1, 1), strict=True))
    assert all((cell.plan, cell.length, cell.dense_score) == ("n/4", 10, 1.0) for cell in (first, second, last))
    assert [cell.score for cell in (first, second, last)] == [0.5, 1.0, 0.0]
    assert first.difference == bootstrap([[0.0, -1.0]]) == Interval(mean=-0.5, low=-1.0, high=0.0)
    assert second.difference.mean == 0 and last.difference.mean == -1
    assert first.logprob_difference == Interval(mean=-0.5, low=-0.5, high=-0.5)


def test_lengths_and_plans_have_rows_of_their_own_and_an_empty_third_has_none():
    prompts = [prompt("a", 0.1, 10), prompt("b", 0.9, 20)]
    answers = [answer(name, plan, "yes") for name in "ab" for plan in ("dense", "n/4", "n/8")]
    cells = compare_depths(make_pairs(prompts, answers))
    assert [(cell.length, cell.plan, cell.depth) for cell in cells] == [
        (length, plan, depth) for length, depth in ((10, "0-33 %"), (20, "66-100 %")) for plan in ("n/4", "n/8")
    ]
    assert all(cell.logprob_difference is None for cell in cells)
    columns, rows = depth_rows(cells)
    assert dict(zip(columns, rows[3], strict=True)) == {
        **{"depth": "66-100 %", "length": "20", "plan": "n/8", "prompts": "1", "dense": "100.0 %", "score": "100.0 %"},
        "difference [95 %]": "+0.0 [+0.0, +0.0]",
    }


@pytest.mark.parametrize("with_depths", [True, False])
def test_the_table_is_shown_only_where_prompts_have_a_depth(with_depths):
    pairs = [pair for pair in make_pairs(PROMPTS, ANSWERS) if with_depths or pair.prompt.name == "e"]
    cells, depths = compare(pairs), compare_depths(pairs)
    facts = {"created": "", "setup": {}, "command": "", "server": {"model": "m"}, "different": []}
    report = Report(cells=cells, depths=depths, **facts)
    assert len(terminal_tables(report)) == 1 + with_depths
    page = html_report(report, None)
    assert ("By depth" in page) == ("0-33 %" in page) == ("-50.0 [-100.0, +0.0]" in page) == with_depths
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert Report(cells=cells, **facts).depths == [], "results from before are read"
