"""The measured losses that `starling doctor` shows."""

from __future__ import annotations

from starling.lab.evaluation.measured import MeasuredLoss, closest, read_measured
from starling.lab.statistics import Interval
from starling.scheduler.star.plan import StarPlan


def row(model: str, block_size: int, overlap_size: int, tokens: int = 2048) -> MeasuredLoss:
    interval = Interval(mean=-0.2, low=-0.3, high=-0.1)
    sizes = {"block_size": block_size, "anchor_size": block_size - overlap_size, "overlap_size": overlap_size}
    numbers = {"attended_keys": 0.5, "dense_score": 0.7, "score": 0.5, "kl": 0.1}
    intervals = {"difference": interval, "logprob_difference": interval}
    return MeasuredLoss(model=model, tokens=tokens, prompts=104, **sizes, **numbers, **intervals)


ROWS = [row(model, block, overlap) for model in ("a", "b") for block in (512, 256, 128) for overlap in (0, block - 32)]


def test_the_most_similar_plan_of_each_model_is_found():
    plan = StarPlan(8192, 128, 8064, 60_000, 65_536)
    assert closest(plan, ROWS) == [row("a", 256, 224), row("b", 256, 224)]
    assert closest(StarPlan(4096, 4096, 0, 60_000, 65_536), ROWS) == [row("a", 128, 0), row("b", 128, 0)]
    assert closest(StarPlan(32_768, 128, 32_640, 60_000, 65_536), ROWS) == [row("a", 512, 480), row("b", 512, 480)]
    assert closest(plan, [row("a", 256, 0)]) == []
    half = row("a", 256, 128)
    assert closest(StarPlan(8192, 4096, 4096, 60_000, 65_536), [row("a", 256, 224), half]) == [half]


def test_a_loss_in_words():
    assert str(row("tiny", 256, 224)) == (
        "tiny, 104 prompts of 2,048 tokens, B = 256, A = 32, O = 224, no dense heads: log-probability "
        "-0.20 [-0.30, -0.10] a token, "
        "score -20.0 [-30.0, -10.0] points of 70"
    )


def test_the_packages_losses_have_both_kinds_of_plan():
    rows = read_measured()
    assert {bool(row.overlap_size) for row in rows} == {False, True}
    assert all(0 < row.attended_keys < 1 and row.prompts >= 100 for row in rows)
