"""Attamba on a GPU that is not there: the states of chunks are scanned and read by its Triton kernels."""

from __future__ import annotations

import pytest

from benchmarks.attamba.random_model import make_random_attamba
from tests.gpu_shim.harness import run_gpu_engine
from tests.gpu_shim.test_engines import decodes
from tests.parity.harness import star
from tests.parity.test_attamba import BLOCKS, TINY, check, prompts

pytestmark = pytest.mark.engine

CHUNK, WINDOW = 2, 5


def test_chunked_prefills_and_decodes_are_those_of_the_reference(tmp_path):
    model = make_random_attamba(
        tmp_path / "model", num_hidden_layers=2, token_chunk=CHUNK, leading_tokens=WINDOW, **TINY
    )
    batch = prompts((50, 1), max_tokens=4)
    batch += [prompt | {"extra_args": star(BLOCKS[CHUNK], 9)} for prompt in prompts((150,), seed=4, max_tokens=3)]
    hits = [prompt | {"prompt_logprobs": False} for prompt in batch]
    result = run_gpu_engine(model, [batch, hits], attention_backend=None, block_size=None, max_num_batched_tokens=96)
    for given, outputs in zip((batch, hits), result["batches"], strict=True):
        for prompt, output in zip(given, outputs, strict=True):
            check(model, prompt, output)
    assert all(step["replayed"] for steps in result["steps"] for step in decodes(steps))
