"""The model of one prompt over replicas: its closed form, and the prediction of docs/replicas.md."""

from __future__ import annotations

import pytest

from benchmarks.replicas.model import LLAMA_8B, Prompt, block_flops, paper_prompt, predict


@pytest.mark.parametrize("blocks", [3, 8, 16, 32, 33])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 8, 16])
def test_rounds_are_those_of_the_closed_form(blocks, replicas):
    """R replicas compute k blocks and R - 1 anchors. Each replica but the first computes at least one of each."""
    prediction = predict(Prompt(blocks, 2.0, 10.0, 5.0, 0.5), replicas)
    assert prediction.rounds == max(-(-(blocks + replicas - 1) // replicas), 2 if replicas > 1 else 0)
    assert prediction.seconds == prediction.rounds * 2.0 + (blocks - prediction.rounds) * 10.0 / 5.0 + 0.5


def test_the_prediction_for_a_million_tokens_of_llama_8b():
    """A token has 128 KiB of KV, and a block 1.4e15 FLOP: 2 x 8e9 x 32,768, and 32,768 x 49,152 pairs."""
    prompt = paper_prompt(LLAMA_8B, 2**20, 32, flops=400e12, gbit=100)
    assert prompt.block_bytes == 2**15 * 128 * 1024
    assert block_flops(LLAMA_8B, 2**15) == pytest.approx(5.26e14 + 8.44e14, rel=0.01)
    assert predict(prompt, 1).seconds == pytest.approx(110, abs=0.5)
    assert predict(prompt, 8).seconds == pytest.approx(26.4, abs=0.1)
