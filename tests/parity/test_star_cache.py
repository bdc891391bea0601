"""Prefix-cache hits give the results of a cold run.

The tests compare generated tokens, because a prompt with prompt logprobs skips the cache.
"""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import TINY, mask_of, max_gap, reference_logprobs, run_engine, star, star_sizes, v2_env

pytestmark = pytest.mark.engine

PAGE_SIZE, LIMIT, TOKENS, NEW = 32, 1e-4, 900, 5
STAR = star(128, 37)
OTHER_ANCHOR = star(128, 37, anchor_size=64)
OTHER_END = star(128, 137)
OVERLAP = star(128, 37, overlap_size=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


def random_ids(seed: int, length: int = TOKENS) -> list[int]:
    tokens = random.Random(seed)
    return [tokens.randrange(256) for _ in range(length)]


def request(ids: list[int], options: dict) -> dict:
    return {"ids": ids, "extra_args": options, "max_tokens": NEW}


def sequence() -> list[tuple[str, dict, int]]:
    """(description, request, expected cached tokens), to run in order on one engine."""
    first, second, third = random_ids(1), random_ids(2), random_ids(3)
    full = (TOKENS - 1) // PAGE_SIZE * PAGE_SIZE
    context_end = TOKENS - 37
    turn = first + random_ids(4, 300)  # the next turn of a chat: the first prompt, an answer, the next question
    return [
        ("dense, cold", request(first, {}), 0),
        ("star after dense: block 0", request(first, STAR), 128),
        ("star again: all", request(first, STAR), full),
        ("dense again: all", request(first, {}), full),
        ("star, cold", request(second, STAR), 0),
        ("dense after star: block 0", request(second, {}), 128),
        ("another anchor: block 0", request(second, OTHER_ANCHOR), 128),
        ("another overlap: block 0", request(second, OVERLAP), 128),
        ("another query: the shorter context", request(second, OTHER_END), (TOKENS - 137) // PAGE_SIZE * PAGE_SIZE),
        ("the next turn of a chat: the whole context", request(turn, STAR), context_end // PAGE_SIZE * PAGE_SIZE),
        ("larger blocks, cold", request(third, star(256, 37)), 0),
        ("smaller blocks after larger ones: block 0", request(third, STAR), 128),
        ("larger blocks again", request(third, star(256, 37)), full),
    ]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_hits_are_correct_and_as_many_as_possible(model, runner):
    steps = sequence()
    env = {"v1": None, "v2": v2_env()}[runner]
    result = run_engine(model, [[step] for _, step, _ in steps], max_num_batched_tokens=300, env=env)
    mask_effects = []
    for (description, step, num_cached), (output,) in zip(steps, result["batches"], strict=True):
        assert output["cached"] == num_cached, description
        ids = step["ids"] + output["token_ids"]
        expected = dense = reference_logprobs(model, ids, None)[-NEW:]
        if step["extra_args"]:
            mask = mask_of(star_sizes(step["extra_args"], len(step["ids"])), len(ids))
            expected = reference_logprobs(model, ids, mask)[-NEW:]
            mask_effects.append((expected - dense).abs().max().item())
        assert max_gap(output["logprobs"], expected) <= LIMIT, description
    assert min(mask_effects) > 100 * LIMIT


def test_requests_of_one_batch_hit_only_pages_of_their_own_plan(model):
    """A dense prompt and two star plans of the same ids run in one batch, twice. Each hits its own pages."""
    ids = random_ids(5)
    batch = [request(ids, options) for options in ({}, STAR, OTHER_ANCHOR)]
    cold, warm = run_engine(model, [batch, batch], max_num_batched_tokens=300)["batches"]
    for before, after in zip(cold, warm, strict=True):
        assert after["cached"] == (TOKENS - 1) // PAGE_SIZE * PAGE_SIZE
        assert before["token_ids"] == after["token_ids"]
        torch.testing.assert_close(
            torch.tensor(before["logprobs"]), torch.tensor(after["logprobs"]), atol=LIMIT, rtol=0
        )
