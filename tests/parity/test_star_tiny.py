"""Virtual rows against the explicit mask on a random Llama: every way a step can cut a prompt, every runner."""

from __future__ import annotations

import random

import pytest

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import TINY, mask_of, max_gap, numbers, reference_logprobs, run_engine, star, v2_env

pytestmark = pytest.mark.engine

LIMIT = 1e-4
# (tokens, options): lengths and context ends that are multiples of nothing, A < B, overlaps, a short last block.
CASES = [
    (1003, star(256, 37)),
    (777, star(96, 130, anchor_size=32)),
    (1150, star(128, 1, anchor_size=64, overlap_size=64)),
    (645, star(160, 5, anchor_size=160, overlap_size=160)),
    (520, star(64, 3, anchor_size=0)),
    (900, {}),
]
RUNNERS = {
    "v1": {"max_num_batched_tokens": 300},
    "v1-one-request-a-step": {"max_num_batched_tokens": 97, "max_num_seqs": 1},
    "v1-compiled": {"max_num_batched_tokens": 300, "enforce_eager": False},
    "v1-tp2": {
        "max_num_batched_tokens": 300,
        "tensor_parallel_size": 2,
    },
    "v2": {"max_num_batched_tokens": 300, "env": v2_env()},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    tokens = random.Random(7)
    return [
        {
            "ids": [tokens.randrange(256) for _ in range(length)],
            "extra_args": options,
            "prompt_logprobs": True,
        }
        for length, options in CASES
    ]


@pytest.fixture(scope="module")
def wanted(model, prompts) -> list[tuple]:
    """(reference logprobs under the mask, distance of dense from it) of each prompt."""
    results = []
    for prompt in prompts:
        ids, options = prompt["ids"], prompt["extra_args"]
        dense = reference_logprobs(model, ids, None)
        if not options:
            results.append((dense, None))
            continue
        masked = reference_logprobs(model, ids, mask_of(numbers(options, len(ids)), len(ids)))
        results.append((masked, (masked - dense).abs().max().item()))
    return results


@pytest.mark.parametrize("runner", RUNNERS)
def test_prompt_logprobs_are_those_of_the_mask(model, prompts, wanted, runner):
    """All requests in one batch, dense and star mixed, and each once more by itself."""
    batches = [prompts] + [[prompt] for prompt in prompts[:2]]
    result = run_engine(model, batches, **RUNNERS[runner])
    got = result["batches"][0] + [batch[0] for batch in result["batches"][1:]]
    for output, (want, teeth) in zip(got, [*wanted, *wanted[:2]], strict=True):
        assert max_gap(output["prompt_logprobs"], want) <= LIMIT
        assert teeth is None or teeth > 1000 * LIMIT


def test_preempted_requests_give_the_same(model, prompts, wanted):
    """A KV cache too small for all that was admitted: requests are preempted while they decode, and resume."""
    longer = [prompt | {"max_tokens": 200} for prompt in prompts[:4]]
    calm = run_engine(model, [longer], max_num_batched_tokens=300)
    tight = run_engine(model, [longer], max_num_batched_tokens=300, num_gpu_blocks_override=122, max_model_len=2048)
    assert calm["metrics"]["vllm:num_preemptions"] == 0
    assert tight["metrics"]["vllm:num_preemptions"] > 0
    for output, quiet, (want, _) in zip(tight["batches"][0], calm["batches"][0], wanted, strict=False):
        assert max_gap(output["prompt_logprobs"], want) <= LIMIT
        assert output["token_ids"] == quiet["token_ids"]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_request_preempted_in_its_prefill_gives_the_same(model, prompts, wanted, runner):
    """The star prompt's last chunks find no page, for the dense one before it has grown."""
    decoding = prompts[5] | {"ids": prompts[5]["ids"][:310], "max_tokens": 120, "prompt_logprobs": False}
    blocks = -(-310 // 32) + -(-len(prompts[2]["ids"]) // 32) + 1
    env = {"v1": None, "v2": v2_env()}[runner]
    batch = [decoding, prompts[2]]
    sizes = {"max_num_batched_tokens": 64, "num_gpu_blocks_override": blocks, "max_model_len": 1216}
    result = run_engine(model, [batch], env=env, **sizes)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert max_gap(result["batches"][0][1]["prompt_logprobs"], wanted[2][0]) <= LIMIT


def test_parallel_samples_share_the_prompt(model, prompts):
    """n > 1: greedy choices are equal, and equal to the single one."""
    prompt = prompts[1] | {"max_tokens": 6, "prompt_logprobs": False}
    single, triple = run_engine(model, [[prompt], [prompt | {"n": 3}]])["batches"]
    assert triple[0]["all_token_ids"] == [single[0]["token_ids"]] * 3


def test_a_seeded_prompt_of_several_steps_is_answered_the_same_way_twice(model, prompts):
    """Plain vLLM 0.32 ends a CPU engine on it (see compat.spare_discarded_generators)."""
    seeded = prompts[0] | {"max_tokens": 8, "prompt_logprobs": False, "seed": 3}
    other = seeded | {"seed": 4}
    batches = run_engine(model, [[seeded, other], [seeded]], max_num_batched_tokens=300)["batches"]
    assert batches[0][0]["token_ids"] == batches[1][0]["token_ids"] != batches[0][1]["token_ids"]
