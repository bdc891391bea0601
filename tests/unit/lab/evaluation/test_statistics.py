"""Scores and statistics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.lab.evaluation.comparison import Cell, compare, make_pairs, score
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.report import overall, summary, table_rows, worst
from starling.lab.evaluation.store import Answer, TokenScore
from starling.lab.statistics import Interval, bootstrap, kl_divergence

STAR_PLAN = {"attention": "star", "keys_attended": 1, "dense_keys": 4}


@pytest.mark.parametrize(
    ("output", "references", "match", "expected"),
    [
        ("it is 123.", ["123"], "all", 1.0),
        ("it is 123.", ["123", "456"], "all", 0.5),
        ("it is 123.", ["123", "456"], "any", 1.0),
        ("it is 12 3.", ["123", "456"], "any", 0.0),
        ("THE\n Red  door", ["the red door"], "all", 1.0),
        ("", ["x"], "all", 0.0),
        ("CAFÉ", ["cafe\u0301"], "all", 1.0),
        ("cafe\u0301", ["café"], "any", 1.0),
    ],
)
def test_scores(output, references, match, expected):
    assert score(output, references, match) == expected


def prompt(name: str, task: str = "vt", length: int | None = 10, references: tuple[str, ...] = ("yes",)) -> Prompt:
    return Prompt(name, task, length, (1, 2), f"the end of {name}", references, "all", (5,), 4)


def answer(name: str, plan: str, text: str, scores: list[TokenScore] | None = None) -> Answer:
    server_plan = {"attention": "dense"} if plan == "dense" else STAR_PLAN
    fields = {"finish_reason": "stop", "token_ids": [5], "server_plan": server_plan, "scores": scores or []}
    return Answer(key=f"{name} {plan}", prompt=name, plan=plan, text=text, **fields)


def test_the_interval_of_equal_differences_is_a_point():
    assert bootstrap([[0.5] * 7, [-0.25] * 3]) == Interval(mean=0.125, low=0.125, high=0.125)


@pytest.mark.parametrize(
    "groups", [[[0.1]], [[0.7, 0.7, 0.7]], [[-1 / 3], [0.2], [0.1]], [[0.1] * 3, [0.2], [0.6] * 7]]
)
def test_rounding_does_not_put_the_mean_outside(groups):
    interval = bootstrap(groups)
    assert interval.low <= interval.mean <= interval.high


def test_the_interval_of_two_prompts_holds_all_their_means():
    """Of two values, a draw has the mean -1, -0.5 or 0, with the probabilities 1/4, 1/2, 1/4: all are above 2.5 %."""
    assert bootstrap([[-1.0, 0.0]]) == Interval(mean=-0.5, low=-1.0, high=0.0)


def test_the_interval_of_many_prompts_is_the_normal_one():
    """Half of 400 differences are -1 and half 0: the standard error is 0.5 / 20, and 1.96 of them are 0.049."""
    interval = bootstrap([[-1.0, 0.0] * 200])
    assert interval.mean == -0.5
    assert abs(interval.low - -0.549) < 0.004 and abs(interval.high - -0.451) < 0.004


def test_groups_have_equal_weight_and_are_drawn_for_themselves():
    """A group that does not vary adds nothing to the width, and halves that of the other one."""
    one, two = bootstrap([[-1.0, 0.0] * 200]), bootstrap([[-1.0, 0.0] * 200, [0.0]])
    assert two.mean == one.mean / 2
    assert two.high - two.low == pytest.approx((one.high - one.low) / 2, rel=0.1)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_an_interval_lies_within_the_values_and_around_the_mean_of_draws(values):
    interval = bootstrap([values])
    assert min(values) - 1e-9 <= interval.low <= interval.mean <= interval.high <= max(values) + 1e-9
    assert bootstrap([values]) == interval


def test_a_cell_pairs_each_prompt_with_itself():
    prompts = [prompt(str(i)) for i in range(4)]
    dense = [answer(str(i), "dense", "yes" if i < 3 else "no") for i in range(4)]
    star = [answer(str(i), "n/4", "yes" if i > 1 else "never") for i in range(4)]
    [cell] = compare(make_pairs(prompts, [*star, *dense]))
    assert (cell.plan, cell.prompts, cell.dense_score, cell.score) == ("n/4", 4, 0.75, 0.5)
    assert cell.difference.mean == -0.25  # -1, -1, 0, 1
    assert cell.same_as_dense == 0.25
    assert cell.attended_keys == 0.25
    assert (cell.kl, cell.top1_agreement, cell.logprob_difference) == (None, None, None)


def test_a_cell_has_the_sizes_that_the_server_reports_and_their_range():
    names = ("block_size", "anchor_size", "overlap_size")
    sizes = {"a": (256, 32, 224), "b": (512, 32, 480), "c": (128, 128, 0)}
    prompts = [prompt("a", "vt"), prompt("b", "vt"), prompt("c", "cwe")]
    answers = [answer(name, "dense", "yes") for name in "abc"]
    answers += [
        answer(name, "n/8", "yes").model_copy(
            update={"server_plan": STAR_PLAN | dict(zip(names, of_prompt, strict=True))}
        )
        for name, of_prompt in sizes.items()
    ]
    cells = compare(make_pairs(prompts, answers))
    shown = ["B 256-512, A 32, O 224-480", "B 128, A 128, O 0", "B 128-512, A 32-128, O 0-480"]
    assert [str(cell.sizes) for cell in cells] == shown
    columns, rows = table_rows(cells)
    assert [row[columns.index("sizes")] for row in rows] == shown
    assert cells[0].sizes.block_size == (256, 512)


def test_dense_and_a_plan_whose_server_does_not_say_its_overlap_have_no_sizes():
    said = STAR_PLAN | {"block_size": 256, "anchor_size": 32}
    star = [answer("a", "n/8", "yes"), answer("a", "n/4", "yes").model_copy(update={"server_plan": said})]
    cells = compare(make_pairs([prompt("a")], [answer("a", "dense", "yes"), *star]))
    [dense] = compare(make_pairs([prompt("a")], [answer("a", "dense", "yes")]))
    columns, rows = table_rows([dense, *cells])
    assert [row[columns.index("sizes")] for row in rows] == [""] * 3


def test_results_without_sizes_are_read():
    [cell] = compare(make_pairs([prompt("a")], [answer("a", "dense", "yes")]))
    assert Cell.model_validate(cell.model_dump(exclude={"sizes"})) == cell


def test_the_mean_over_tasks_weighs_each_equally():
    prompts = [prompt("a", "vt"), prompt("b", "vt"), prompt("c", "vt"), prompt("d", "cwe")]
    dense = [answer(name, "dense", "yes") for name in "abcd"]
    star = [answer(name, "n/4", "yes" if name != "d" else "") for name in "abcd"]
    *_, total = compare(make_pairs(prompts, dense + star))
    assert (total.task, total.length, total.prompts) == ("all", None, 4)
    assert (total.score, total.difference.mean) == (0.5, -0.5)


def test_dense_alone_has_cells_without_differences():
    [cell] = compare(make_pairs([prompt("a")], [answer("a", "dense", "yes")]))
    assert (cell.plan, cell.score, cell.difference) == ("dense", 1.0, None)
    assert summary([cell]) == ["Dense scores 100.0 % over 1 prompts. No star plan was measured."]
    [cell] = compare(make_pairs([prompt("a", references=())], [answer("a", "dense", "yes")]))
    assert summary([cell]) == ["Dense answers 1 prompts without expected answers. No star plan was measured."]


def test_prompts_without_references_are_compared_with_dense_and_not_averaged_with_others():
    prompts = [prompt("a", "prompts", None), prompt("b", "other", None, ())]
    answers = [answer(name, plan, "yes") for name in "ab" for plan in ("dense", "n/4")]
    cells = compare(make_pairs(prompts, answers))
    assert [(cell.task, cell.against_reference, cell.score) for cell in cells] == [
        ("prompts", True, 1.0),
        ("other", False, 1.0),
    ]
    assert len(overall(cells)) == 2
    assert "gives dense's exact answer to 100.0 % of 1 prompts" in summary(cells)[1] and "KL" not in summary(cells)[1]
    scored = cells[1].model_copy(update={"kl": 0.25})
    assert summary([scored])[0].endswith(" Its distributions are 0.2500 nats a token from dense's (KL).")
    columns, rows = table_rows(cells)
    assert dict(zip(columns, rows[1], strict=True))["difference [95 %]"] == ""


def test_distributions_along_the_answer():
    at = TokenScore(logprob=math.log(0.5), top={1: math.log(0.5), 2: math.log(0.25)})
    moved = TokenScore(logprob=math.log(0.25), top={1: math.log(0.25), 2: math.log(0.5)})
    answers = [answer("a", "dense", "yes", [at, at]), answer("a", "n/4", "yes", [at, moved])]
    [cell] = compare(make_pairs([prompt("a")], answers))
    assert cell.logprob_difference.mean == pytest.approx(-math.log(2) / 2)
    assert cell.top1_agreement == 0.5
    assert cell.kl == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2)


@given(st.data())
def test_the_divergence_of_parts_is_a_lower_bound(data):
    """Against the exact divergence of two distributions over eight tokens, from the five most probable of each."""
    weights = st.lists(st.floats(0.01, 1), min_size=8, max_size=8)
    one, two = (np.array(data.draw(weights)) for _ in range(2))
    one, two = one / one.sum(), two / two.sum()
    exact = float(np.sum(one * np.log(one / two)))
    known = [{int(i): float(np.log(p[i])) for i in np.argsort(-p)[:5]} for p in (one, two)]
    assert -1e-9 <= kl_divergence(*known) <= exact + 1e-9
    everything = [{i: float(np.log(p[i])) for i in range(8)} for p in (one, two)]
    assert kl_divergence(*everything) == pytest.approx(exact, abs=1e-9)


def test_distributions_without_a_common_token():
    assert kl_divergence({1: -0.1}, {2: -0.1}) == 0.0


def test_the_row_of_all_tasks_pools_positions_and_averages_log_probabilities_over_tasks():
    same = TokenScore(logprob=math.log(0.5), top={1: math.log(0.5), 2: math.log(0.25)})
    moved = TokenScore(logprob=math.log(0.25), top={1: math.log(0.25), 2: math.log(0.5)})
    prompts = [prompt("a", "vt"), prompt("b", "cwe")]
    dense = [answer("a", "dense", "yes", [same] * 3), answer("b", "dense", "yes", [same])]
    star = [answer("a", "n/4", "yes", [same] * 3), answer("b", "n/4", "yes", [moved])]
    one, two, total = compare(make_pairs(prompts, dense + star))
    assert total.logprob_difference.mean == pytest.approx(-math.log(2) / 2)
    assert (one.top1_agreement, two.top1_agreement, total.top1_agreement) == (1.0, 0.0, 0.75)
    assert total.kl == pytest.approx((3 * one.kl + two.kl) / 4)


def test_the_worst_answers_come_first_and_equal_ones_not_at_all():
    prompts = [prompt(name) for name in "abc"]
    star = {"a": "yes", "b": "yes, I think", "c": "no"}
    answers = [answer(name, "dense", "yes") for name in "abc"]
    answers += [answer(name, "n/4", text) for name, text in star.items()]
    found = worst(make_pairs(prompts, answers))
    assert [(example.prompt, example.score) for example in found] == [("c", 0.0), ("b", 1.0)]
    assert worst(make_pairs(prompts, answers), count=1) == found[:1]
    assert found[0].prompt_end == "the end of c"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.3, -0.1, "below dense"), (-0.3, 0.1, "no measured difference to dense"), (0.1, 0.2, "above dense")],
)
def test_what_the_summary_says_of_an_interval(low, high, verdict):
    [cell] = compare(make_pairs([prompt("a")], [answer("a", plan, "yes") for plan in ("dense", "n/4")]))[:1]
    interval = Interval(mean=(low + high) / 2, low=low, high=high)
    changed = cell.model_copy(update={"difference": interval, "prompts": 10})
    [text] = summary([changed])
    assert verdict in text and text.startswith("n/4 scores 100.0 % over 10 prompts, dense 100.0 %")
    assert text.endswith("with 25.0 % of dense's attention work.")
    [warned] = summary([changed.model_copy(update={"dense_score": 0.09})])
    assert warned.endswith("attention work. Dense scores so little that there is little to lose.")
    [few] = summary([changed.model_copy(update={"prompts": 9})])
    assert "points, too few prompts for a verdict, with" in few and verdict not in few
