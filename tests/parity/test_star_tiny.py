"""Virtual rows against the explicit mask on a random Llama, for steps that cut prompts anywhere, in every runner."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import (
    OLDER_PROCESSORS,
    TINY,
    mask_of,
    max_gap,
    older_env,
    reference_logprobs,
    run_engine,
    star,
    star_sizes,
    v2_env,
)

pytestmark = pytest.mark.engine

LIMIT = 1e-4
OPS = [{"call": f"tests.parity.cpu_ops:{name}"} for name in ("use_starlings", "use_vllms", "check_vllms")]
# (tokens, options): unaligned lengths and context ends, A < B, overlaps, a short last block.
CASES = [
    (1003, star(256, 37)),
    (777, star(96, 130, anchor_size=32)),
    (1150, star(128, 1, anchor_size=64, overlap_size=64)),
    (645, star(160, 5, anchor_size=160, overlap_size=160)),
    (520, star(64, 3, anchor_size=0)),
    (900, {}),
    (1020, {"star": "on", "star_block_size": 256, "star_query_tokens": 21}),  # the default anchor and overlap
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
def expected(model, prompts) -> list[tuple]:
    """(reference logprobs under the mask, their distance from dense logprobs or None) of each prompt."""
    results = []
    for prompt in prompts:
        ids, options = prompt["ids"], prompt["extra_args"]
        dense = reference_logprobs(model, ids, None)
        if not options:
            results.append((dense, None))
            continue
        masked = reference_logprobs(model, ids, mask_of(star_sizes(options, len(ids)), len(ids)))
        results.append((masked, (masked - dense).abs().max().item()))
    return results


@pytest.mark.parametrize("runner", RUNNERS)
def test_prompt_logprobs_are_those_of_the_mask(model, prompts, expected, runner):
    """Dense and star requests run in one batch, and the first two also alone."""
    batches = [prompts] + [[prompt] for prompt in prompts[:2]]
    result = run_engine(model, batches, **RUNNERS[runner])
    got = result["batches"][0] + [batch[0] for batch in result["batches"][1:]]
    for output, (logprobs, mask_effect) in zip(got, [*expected, *expected[:2]], strict=True):
        assert max_gap(output["prompt_logprobs"], logprobs) <= LIMIT
        assert mask_effect is None or mask_effect > 1000 * LIMIT


@pytest.mark.parametrize("processor", ["this one", *OLDER_PROCESSORS])
def test_each_op_of_a_processor_gives_those_of_the_mask(model, prompts, expected, processor):
    """Starling's op and then vLLM's, whichever is faster; the code of both depends on the processor."""
    few, (starling, vllm, check) = [*prompts[1:3], prompts[5]], OPS
    env = None if processor == "this one" else older_env(processor)
    result = run_engine(model, [starling, few, vllm, few, check], max_num_batched_tokens=300, env=env)
    for batch in result["batches"]:
        for output, (logprobs, _) in zip(batch, [*expected[1:3], expected[5]], strict=True):
            assert max_gap(output["prompt_logprobs"], logprobs) <= LIMIT


@pytest.mark.parametrize("processor", OLDER_PROCESSORS)
def test_bfloat16_on_an_older_processor_costs_no_more_than_it_costs_dense_attention(
    model, prompts, expected, processor
):
    """By each of the two ops. The tests of this processor are in test_star_smollm2.py and test_documents.py."""
    dense, (starling, vllm, check) = prompts[1] | {"extra_args": {}}, OPS
    batch = [prompts[1], dense]
    engine = {"dtype": "bfloat16", "max_num_batched_tokens": 300, "env": older_env(processor)}
    references = [expected[1][0], reference_logprobs(model, dense["ids"], None)]
    for outputs in run_engine(model, [starling, batch, vllm, batch, check], **engine)["batches"]:
        star_error, dense_error = (
            (torch.tensor(output["prompt_logprobs"]) - logprobs).square().mean().sqrt().item()
            for output, logprobs in zip(outputs, references, strict=True)
        )
        print(f"bfloat16 error on {processor}: star {star_error:.2e}, dense {dense_error:.2e}")
        assert 0 < star_error <= 2 * dense_error


def test_preempted_requests_give_the_same(model, prompts, expected):
    """The KV cache is too small for the admitted requests: they are preempted while they decode, and resume."""
    longer = [prompt | {"max_tokens": 200} for prompt in prompts[:4]]
    large = run_engine(model, [longer], max_num_batched_tokens=300)
    small = run_engine(model, [longer], max_num_batched_tokens=300, num_gpu_blocks_override=122, max_model_len=2048)
    assert large["metrics"]["vllm:num_preemptions"] == 0
    assert small["metrics"]["vllm:num_preemptions"] > 0
    for output, other, (logprobs, _) in zip(small["batches"][0], large["batches"][0], expected, strict=False):
        assert max_gap(output["prompt_logprobs"], logprobs) <= LIMIT
        assert output["token_ids"] == other["token_ids"]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_request_preempted_in_its_prefill_gives_the_same(model, prompts, expected, runner):
    """No page is free for the last chunks of the star prompt, because the dense request before it has grown."""
    decoding = prompts[5] | {"ids": prompts[5]["ids"][:310], "max_tokens": 120, "prompt_logprobs": False}
    num_blocks = -(-310 // 32) + -(-len(prompts[2]["ids"]) // 32) + 1
    env = {"v1": None, "v2": v2_env()}[runner]
    batch = [decoding, prompts[2]]
    sizes = {"max_num_batched_tokens": 64, "num_gpu_blocks_override": num_blocks, "max_model_len": 1216}
    result = run_engine(model, [batch], env=env, **sizes)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert max_gap(result["batches"][0][1]["prompt_logprobs"], expected[2][0]) <= LIMIT


def test_parallel_samples_of_one_prompt_are_equal(model, prompts):
    """With n > 1, all greedy choices equal that of a single sample."""
    prompt = prompts[1] | {"max_tokens": 6, "prompt_logprobs": False}
    single, triple = run_engine(model, [[prompt], [prompt | {"n": 3}]])["batches"]
    assert triple[0]["all_token_ids"] == [single[0]["token_ids"]] * 3


def test_a_seeded_prompt_of_several_steps_gives_the_same_tokens_twice(model, prompts):
    """A CPU engine of plain vLLM 0.32 crashes on such a prompt (see vllm_compat's without_discarded_generators)."""
    seeded = prompts[0] | {"max_tokens": 8, "prompt_logprobs": False, "seed": 3}
    other = seeded | {"seed": 4}
    batches = run_engine(model, [[seeded, other], [seeded]], max_num_batched_tokens=300)["batches"]
    assert batches[0][0]["token_ids"] == batches[1][0]["token_ids"] != batches[0][1]["token_ids"]
