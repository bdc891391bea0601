"""The statistics of docs/star-accuracy.md: the losses of two plans are compared prompt by prompt."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import accuracy
from starling.lab.evaluation.store import Answer, TokenScore


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
