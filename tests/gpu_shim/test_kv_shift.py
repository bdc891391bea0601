"""KV shifting attention on a GPU that is not there: its state between chunks is read in full graphs of decodes."""

from __future__ import annotations

import pytest

from benchmarks.kv_shift.random_model import TINY_LLAMA
from tests.gpu_shim.harness import run_gpu_engine
from tests.parity.harness import star
from tests.parity.kv_shift_cases import Model, cached_prompt, random_ids, uncached_prompt

pytestmark = pytest.mark.engine

LIMIT, PAGE_SIZE = 1e-4, 32


def test_decodes_replay_full_graphs_and_are_those_of_the_reference(tmp_path):
    model = Model.random(tmp_path / "model", TINY_LLAMA)
    first = random_ids(1, 2 * PAGE_SIZE + 9)
    batch = [
        uncached_prompt(first),
        uncached_prompt(random_ids(2, 40), max_tokens=3),
        uncached_prompt(random_ids(3, 3 * PAGE_SIZE + 5), star(PAGE_SIZE, 7)),
    ]
    hits = [cached_prompt(first[: PAGE_SIZE + 5] + random_ids(4, 3)), cached_prompt(first, max_tokens=3)]
    result = run_gpu_engine(model.path, [batch, hits], block_size=PAGE_SIZE, max_num_batched_tokens=96)
    for prompts, outputs in zip((batch, hits), result["batches"], strict=True):
        for prompt, output in zip(prompts, outputs, strict=True):
            assert model.gap(prompt, output) <= LIMIT
    decodes = [step for steps in result["steps"] for step in steps if step["tokens"] == step["requests"]]
    assert all(step["replayed"] for step in decodes) and {1, 2} <= {step["requests"] for step in decodes}
