"""What the figure shows of cells, and that it is drawn for prompts without references too."""

from __future__ import annotations

import pytest

from starling.lab.evaluation.comparison import Cell
from starling.lab.evaluation.report import figure_png, in_words, make_panels
from starling.lab.statistics import Interval


def cell(against_reference: bool, kl: float | None = None, plan: str = "n/8") -> Cell:
    difference = None if plan == "dense" else Interval(mean=-0.25, low=-0.5, high=0.0)
    scores = {"dense_score": 1, "score": 0.75, "same_as_dense": 0.75, "difference": difference}
    rest = {"attended_keys": None, "logprob_difference": None, "top1_agreement": None, "kl": kl}
    return Cell(task="t", length=None, plan=plan, prompts=4, against_reference=against_reference, **scores, **rest)


@pytest.mark.parametrize(
    ("shown", "label", "equal", "value"),
    [
        (cell(True, 0.2), "points above or below dense", 0, (-25, -50, 0)),
        (cell(False), "same answer as dense", 100, (75, 50, 100)),
        (cell(False, 0.2), "KL, nats", 0, (0.2, 0.2, 0.2)),
    ],
)
def test_each_kind_of_prompt_has_its_measure_and_a_figure(shown, label, equal, value):
    [panel] = make_panels([shown])
    assert panel.label.startswith(label) and panel.equal == equal
    assert panel.values == [(shown, Interval(mean=value[0], low=value[1], high=value[2]))]
    pytest.importorskip("matplotlib")
    assert figure_png([shown]).startswith(b"\x89PNG")


def test_both_kinds_of_prompts_have_a_panel_each():
    cells = [cell(True), cell(False)]
    assert [shown for panel in make_panels(cells) for shown, _ in panel.values] == cells
    pytest.importorskip("matplotlib")
    assert len(figure_png(cells)) > len(figure_png(cells[:1]))


def test_dense_alone_has_no_figure():
    assert make_panels([cell(True, plan="dense"), cell(False, plan="dense")]) == []
    assert figure_png([cell(True, plan="dense")]) is None


def test_a_legend_names_plans_in_words():
    assert in_words("B=512,A=64,O=448,Q=128") == "blocks of 512, anchor 64, overlap 448, query 128"
    assert in_words("n/8,O=0,H=0.1") == "blocks of 1/8 of the prompt, no overlap, dense heads 0.1"
    assert in_words("B=n/4") == "blocks of 1/4 of the prompt"
    assert in_words("default") == "default"
