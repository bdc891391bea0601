"""The model of one prompt over replicas: its closed form, and its predictions from measured times."""

from __future__ import annotations

import pytest

from benchmarks.replicas.model import LLAMA_8B, Prompt, block_flops, error, measured_prompt, paper_prompt, predict
from benchmarks.replicas.ttft import KV_BYTES, summary


@pytest.mark.parametrize("blocks", [3, 8, 16, 32, 33])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 8, 16])
def test_rounds_are_those_of_the_closed_form(blocks, replicas):
    """R replicas compute k blocks and R - 1 anchors. Each replica but the first computes at least one of each."""
    prediction = predict(Prompt(blocks, 2.0, 10.0, 5.0, 0.5), replicas)
    assert prediction.rounds == max(-(-(blocks + replicas - 1) // replicas), 2 if replicas > 1 else 0)
    assert prediction.prefill == prediction.rounds * 2.0
    assert prediction.moved == (blocks - prediction.rounds) * 10.0
    assert prediction.seconds == prediction.prefill + prediction.moved / 5.0 + 0.5


def test_the_speed_up_of_k_blocks_over_k_minus_1_replicas_is_half_of_k():
    alone, split = (predict(Prompt(32, 1.0, 0.0, 1.0), replicas) for replicas in (1, 31))
    assert alone.seconds / split.seconds == 16


def test_the_time_on_two_replicas_is_predicted_from_one():
    """Times that follow the model have no error; longer times have an error below 0."""
    blocks, block, rate, query, tokens = 16, 0.25, 1e9, 0.1, 16384
    moved = 7 * tokens / blocks * KV_BYTES
    one, two = blocks * block + query, 9 * block + moved / rate + query
    counted = {
        "starling:bytes_moved_total": moved,
        "starling:move_seconds_total": moved / rate,
        "starling:split_seconds_total": 9 * block,
    }
    row = summary(tokens, "TCP", blocks, [one], [two], [query], [counted])
    assert row["predicted_seconds"] == pytest.approx(two)
    assert row["prediction_error"] == pytest.approx(0, abs=1e-9)
    slower = summary(tokens, "TCP", blocks, [one], [2 * two], [query], [counted])
    assert slower["predicted_seconds"] == pytest.approx(two)
    assert slower["prediction_error"] == pytest.approx(-0.5)


def test_the_prompt_of_a_row_uses_only_the_rate_of_two_replicas():
    row = {"tokens": 4096, "blocks": 8, "seconds_on_one": [9.0, 5.0, 1.0], "seconds_cached": [1.0]}
    prompt = measured_prompt(row | {"bytes_per_second": 7.0}, 8.0)
    assert prompt == Prompt(8, 0.5, 4096.0, 7.0, 1.0)
    assert error(6.0, [4.0, 5.0, 99.0]) == pytest.approx(0.2)


def test_the_prediction_for_a_million_tokens_of_llama_8b():
    """A token has 128 KiB of KV, and a block 1.4e15 FLOP: 2 x 8e9 x 32,768, and 32,768 x 49,152 pairs."""
    prompt = paper_prompt(LLAMA_8B, 2**20, 32, flops=400e12, gbit=100)
    assert prompt.block_bytes == 2**15 * 128 * 1024
    assert block_flops(LLAMA_8B, 2**15) == pytest.approx(5.26e14 + 8.44e14, rel=0.01)
    assert predict(prompt, 1).seconds == pytest.approx(110, abs=0.5)
    assert predict(prompt, 8).seconds == pytest.approx(26.4, abs=0.1)
