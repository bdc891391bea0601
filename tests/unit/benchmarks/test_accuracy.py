"""docs/star-accuracy.md and `starling doctor` have the figures of benchmarks/results."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import accuracy, approximations
from benchmarks.report import RESULTS
from starling.evaluation.measured import read_measured
from starling.evaluation.store import Answer, TokenScore

PAGE = (RESULTS.parents[1] / "docs" / "star-accuracy.md").read_text(encoding="utf-8")


def stored(pattern: str) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
    assert found
    return found


def test_the_page_has_the_table_of_the_results():
    assert accuracy.markdown(stored("accuracy_*.json")) in PAGE


def test_the_table_of_other_approximations_has_a_row_for_each():
    for result in stored("approximations_*.json"):
        rows = approximations.markdown(result).splitlines()[2:]
        assert [row.split(" | ")[0][2:] for row in rows] == [name for name in result["rows"] if name != "dense"]


def test_the_rows_of_doctor_are_those_of_the_results():
    assert accuracy.all_measured_rows() == [row.model_dump() for row in read_measured()]


def test_plans_of_equal_blocks_have_equal_keys():
    paper, overlap = accuracy.plans(2048, [8])
    assert (paper, overlap) == ("B=256,A=256,O=0,Q=128", "B=256,A=32,O=224,Q=128")
    assert accuracy.half_anchor(paper) == accuracy.half_anchor(overlap) == "B=256,A=128,O=128,Q=128"
    named = [paper, overlap, accuracy.half_anchor(paper), "B=256,A=256,P=block,Q=128"]
    assert list(map(accuracy.described, named)) == [
        "A = B",
        "an overlap",
        "half an anchor and half an overlap",
        "positions of a block's own",
    ]


def test_ratios_of_losses_are_paired():
    """Each prompt diverges as much with both plans, and loses twice as much: the intervals have no width."""

    def answer(prompt: str, plan: str, other: float) -> Answer:
        score = TokenScore(
            logprob={"dense": -0.1, "paper": -0.2, "overlap": -0.3}[plan],
            top={1: float(np.log(1 - other)), 2: float(np.log(other))},
        )
        rest = {"text": "", "finish_reason": "stop", "token_ids": [1], "server_plan": {}, "scores": [score]}
        return Answer(key=prompt + plan, prompt=prompt, plan=plan, **rest)

    shares = {"dense": 0.5, "paper": 0.9, "overlap": 0.9}
    answers = [answer(prompt, plan, share) for prompt in "ab" for plan, share in shares.items()]
    [row] = accuracy.loss_ratios(answers, [("paper", "overlap")])
    assert row["kl_ratio"] == pytest.approx([1.0, 1.0, 1.0])
    assert row["logprob_ratio"] == pytest.approx([2.0, 2.0, 2.0])


def test_answers_of_a_folder_with_more_prompts_and_plans_are_left_out():
    setup = {"tasks": ["vt", "fwe"], "lengths": [2048], "prompts_per_cell": 2, "plans": {"dense": {}, "paper": {}}}

    def answer(prompt: str, plan: str) -> Answer:
        fields = {"text": "", "finish_reason": "stop", "token_ids": [1], "server_plan": None}
        return Answer(key=f"{prompt} {plan}", prompt=prompt, plan=plan, scores=[at(0.5)], **fields)

    def at(share: float) -> TokenScore:
        return TokenScore(logprob=0.0, top={1: float(np.log(share)), 2: float(np.log(1 - share))})

    names = ["vt/2048/0", "fwe/2048/1", "vt/2048/2", "cwe/2048/0"]
    answers = [answer(name, plan) for name in names for plan in ("dense", "paper", "other")][:-1]
    kept = accuracy.answers_of(setup, answers)
    assert [(found.prompt, found.plan) for found in kept] == [
        (name, plan) for name in names[:2] for plan in ("dense", "paper")
    ]


def test_other_approximations_have_no_more_keys_than_star():
    masks = approximations.approximations(24)
    star = approximations.star_sizes(approximations.BLOCK, approximations.BLOCK, 0).sum()
    names = ("a page and overlap", "half an anchor and half an overlap")
    for name in (*names, "star, 3 dense layers", "overlap, 3 dense layers"):
        keys = [int(masks[name](layer, None, None).sum()) for layer in range(24)]
        assert np.mean(keys) <= star, name
        assert (len(set(keys)) == 2) == ("dense layers" in name)
