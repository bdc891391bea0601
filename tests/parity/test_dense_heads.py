"""KV heads that see everything beside heads that see star blocks, against explicit masks for each head.

The scores of the random model are random too, so layers have no, some or only dense heads, and shares of 0.25 and 0.5
stand in one batch.
"""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import mask_of, max_gap, reference_logprobs, run_engine, star, star_sizes, v2_env

pytestmark = pytest.mark.engine

LIMIT = 1e-4
SIZES = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
SCORES = [[0.1, 0.9, 0.2, 0.8], [0.0, -0.1, 0.3, 0.05], [0.7, 0.6, 0.5, 0.4]]
"""At a share of 0.5, layer 0 has two dense heads, layer 1 none, and layer 2 dense heads only."""
DENSE = {
    0: [],
    0.25: [(0, 1), (0, 3), (2, 0)],
    0.5: [(0, 1), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3)],
    1: [(layer, head) for layer in range(3) for head in range(4)],
}
# (tokens, options): a dense prompt, plans without dense heads, and plans with three numbers of them.
CASES = [
    (803, star(256, 37) | {"star_dense_heads": 0.25}),
    (777, star(96, 130, anchor_size=32)),
    (950, star(128, 1, anchor_size=64, overlap_size=64) | {"star_dense_heads": 0.5}),
    (500, {}),
    (520, star(64, 3, anchor_size=0) | {"star_dense_heads": 0.25}),
    (400, star(64, 9) | {"star_dense_heads": 1}),
]
RUNNERS = {
    "v1": {"max_num_batched_tokens": 300},
    "v1-one-request-a-step": {"max_num_batched_tokens": 97, "max_num_seqs": 1},
    "v1-compiled": {"max_num_batched_tokens": 300, "enforce_eager": False},
    "v1-tp2": {"max_num_batched_tokens": 300, "tensor_parallel_size": 2},
    "v2": {"max_num_batched_tokens": 300, "env": v2_env()},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **SIZES)


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> dict:
    """The engine's option with the file of scores."""
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    path.write_text(json.dumps({"scores": SCORES}))
    return {"star_heads": str(path)}


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    tokens = random.Random(5)
    return [
        {"ids": [tokens.randrange(256) for _ in range(length)], "extra_args": options, "prompt_logprobs": True}
        for length, options in CASES
    ]


def expected_of(model, ids: list[int], options: dict):
    mask = mask_of(star_sizes(options, len(ids)), len(ids)) if options else None
    return reference_logprobs(model, ids, mask, dense_heads=DENSE[options.get("star_dense_heads", 0)])


@pytest.fixture(scope="module")
def expected(model, prompts) -> list:
    return [expected_of(model, prompt["ids"], prompt["extra_args"]) for prompt in prompts]


def test_dense_heads_make_another_result_than_star_and_dense_attention(model, prompts, expected):
    for prompt, logprobs in zip(prompts, expected, strict=True):
        options = prompt["extra_args"]
        share = options.get("star_dense_heads", 0)
        without = {name: value for name, value in options.items() if name != "star_dense_heads"}
        gaps = [max_gap(logprobs.tolist(), expected_of(model, prompt["ids"], other)) for other in ({}, without)]
        if share in (0.25, 0.5):
            assert min(gaps) > 100 * LIMIT
        elif share == 1:
            assert gaps[0] <= LIMIT


@pytest.mark.parametrize("runner", RUNNERS)
def test_prompt_logprobs_are_those_of_the_masks(model, prompts, expected, heads, runner):
    """All prompts run in one batch, and the first two also alone."""
    batches = [prompts, *([prompt] for prompt in prompts[:2])]
    result = run_engine(model, batches, star=heads, **RUNNERS[runner])
    got = result["batches"][0] + [batch[0] for batch in result["batches"][1:]]
    for output, logprobs in zip(got, [*expected, *expected[:2]], strict=True):
        assert max_gap(output["prompt_logprobs"], logprobs) <= LIMIT
