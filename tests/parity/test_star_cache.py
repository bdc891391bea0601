"""Prefix-cache hits give what a cold run gives: judged by generated tokens, for prompt logprobs skip the cache."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import TINY, mask_of, max_gap, numbers, reference_logprobs, run_engine, star, v2_env

pytestmark = pytest.mark.engine

PAGE, LIMIT, TOKENS, NEW = 32, 1e-4, 900, 5
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
    """(what it shows, request, tokens it must find in the cache): run one after the other on one engine."""
    first, second, third = random_ids(1), random_ids(2), random_ids(3)
    full = (TOKENS - 1) // PAGE * PAGE
    context_end = TOKENS - 37
    turn = first + random_ids(4, 300)  # the chat goes on: the first prompt, an answer, the next question
    return [
        ("dense, cold", request(first, {}), 0),
        ("star after dense: block 0", request(first, STAR), 128),
        ("star again: all", request(first, STAR), full),
        ("dense again: all", request(first, {}), full),
        ("star, cold", request(second, STAR), 0),
        ("dense after star: block 0", request(second, {}), 128),
        ("another anchor: block 0", request(second, OTHER_ANCHOR), 128),
        ("another overlap: block 0", request(second, OVERLAP), 128),
        ("another query: the shorter context", request(second, OTHER_END), (TOKENS - 137) // PAGE * PAGE),
        ("a chat's next turn: the whole context", request(turn, STAR), context_end // PAGE * PAGE),
        ("larger blocks, cold", request(third, star(256, 37)), 0),
        ("smaller blocks after larger ones: block 0", request(third, STAR), 128),
        ("larger blocks again", request(third, star(256, 37)), full),
    ]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_hits_are_right_and_no_fewer_than_can_be(model, runner):
    steps = sequence()
    env = {"v1": None, "v2": v2_env()}[runner]
    result = run_engine(model, [[step] for _, step, _ in steps], max_num_batched_tokens=300, env=env)
    teeth = []
    for (what, step, cached), (output,) in zip(steps, result["batches"], strict=True):
        assert output["cached"] == cached, what
        ids = step["ids"] + output["token_ids"]
        dense = reference_logprobs(model, ids, None)[-NEW:]
        want = dense
        if step["extra_args"]:
            mask = mask_of(numbers(step["extra_args"], len(step["ids"])), len(ids))
            want = reference_logprobs(model, ids, mask)[-NEW:]
            teeth.append((want - dense).abs().max().item())
        assert max_gap(output["logprobs"], want) <= LIMIT, what
    assert min(teeth) > 100 * LIMIT


def test_requests_that_arrive_together_share_only_what_is_theirs(model):
    """Dense and two star plans of the same ids in one batch, then again: each finds its own pages."""
    ids = random_ids(5)
    batch = [request(ids, options) for options in ({}, STAR, OTHER_ANCHOR)]
    cold, warm = run_engine(model, [batch, batch], max_num_batched_tokens=300)["batches"]
    for before, after in zip(cold, warm, strict=True):
        assert after["cached"] == (TOKENS - 1) // PAGE * PAGE
        assert before["token_ids"] == after["token_ids"]
        torch.testing.assert_close(
            torch.tensor(before["logprobs"]), torch.tensor(after["logprobs"]), atol=LIMIT, rtol=0
        )
