"""Star Attention on hybrid models: their full-attention layers have the star mask, their states see every token.

The reference is Transformers' model in float32. It takes the mask in its full-attention layers, and runs the other
layers over the whole sequence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.parity.harness import (
    check_greedy,
    mask_of,
    reference_logprobs,
    reference_scores,
    run_engine,
    star,
    star_sizes,
    v2_env,
)
from tests.parity.hybrid_models import FAMILIES, PAGE_SIZE, make_random_hybrid

pytestmark = pytest.mark.engine

B, TOKENS, NEW = 2 * PAGE_SIZE, 395, 5
STAR = star(B, 37)
WHOLE, SHORT = 2048, 200  # tokens of a step: all prompts in one, and prompts in several chunks
CASES = [("falcon", "v1"), ("granite", "v2"), ("qwen", "v1")]
# The largest and the mean gap of log-probabilities, and the least mean effect of the mask, which is above that gap.
LIMITS = {torch.float32: (1e-4, 1e-5, 0.05), torch.bfloat16: (0.6, 0.12, 0.14)}


def random_ids(seed: int, length: int) -> list[int]:
    tokens = random.Random(seed)
    return [tokens.randrange(256) for _ in range(length)]


# Unaligned lengths and context ends, A < B, an overlap, and a dense prompt among star prompts.
PROMPTS = [
    {"ids": random_ids(seed, length), "extra_args": options, "prompt_logprobs": True}
    for seed, (length, options) in enumerate(
        [(TOKENS, STAR), (330, star(B, 5, anchor_size=PAGE_SIZE, overlap_size=PAGE_SIZE)), (150, {})]
    )
]
FIRST, SECOND = random_ids(11, TOKENS), random_ids(12, TOKENS)
FULL = (TOKENS - 1) // PAGE_SIZE * PAGE_SIZE
NEXT, CONTEXT = random_ids(13, 90), (TOKENS - 37) // PAGE_SIZE * PAGE_SIZE
# (description, token ids, options, expected cached tokens), to run in order on one engine. A hit needs the states at
# its end, and vLLM keeps those of few places.
TURNS = [
    ("dense, cold", FIRST, {}, 0),
    ("star after dense: no state is kept at the end of block 0", FIRST, STAR, 0),
    ("star again: all", FIRST, STAR, FULL),
    ("dense again: all", FIRST, {}, FULL),
    ("the next turn: block 0, which vLLM has seen in two prompts", FIRST + NEXT, STAR, B),
    ("star, cold", SECOND, STAR, 0),
    ("the next turn: the pages of the context", SECOND + NEXT, STAR, CONTEXT),
    ("dense after star: no state is kept at the end of block 0", SECOND, {}, 0),
]


@dataclass(frozen=True)
class Run:
    """What one engine answered: the prompts in one step, in several, and the turns."""

    model: Path
    dtype: torch.dtype
    limits: tuple[float, float, float]
    answers: list[list[dict]]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def run(request, tmp_path_factory) -> Run:
    family, runner = request.param
    dtype = FAMILIES[family][2]
    model = make_random_hybrid(tmp_path_factory.mktemp("models") / family, family)
    turns = [[{"ids": ids, "extra_args": options, "max_tokens": NEW}] for _, ids, options, _ in TURNS]
    result = run_engine(
        model,
        [PROMPTS, {"chunk": SHORT}, PROMPTS, *turns],
        env=v2_env() if runner == "v2" else None,
        dtype=str(dtype).removeprefix("torch."),
        mamba_ssm_cache_dtype="float32",  # vLLM's own choice on a processor with AVX512-BF16; PAGE_SIZE depends on it
        max_num_batched_tokens=WHOLE,
        max_model_len=WHOLE,
    )
    return Run(model, dtype, LIMITS[dtype], result["batches"])


def compare(run: Run, got: list[float], ids: list[int], options: dict, num_prompt_tokens: int, at: slice) -> None:
    """Hold log-probabilities of ids against the reference's. Those without a mask must be far away."""
    expected = dense = reference_logprobs(run.model, ids, None)[at]
    if options:
        mask = mask_of(star_sizes(options, num_prompt_tokens), len(ids))
        expected = reference_logprobs(run.model, ids, mask)[at]
    gap = (torch.tensor(got) - expected).abs()
    effect = (expected - dense).abs()
    print(f"gap {gap.max():.1e}, mean {gap.mean():.1e}; of the mask {effect.max():.1e}, mean {effect.mean():.1e}")
    largest, mean, least_effect = run.limits
    assert gap.max() <= largest and gap.mean() <= mean
    assert not options or effect.mean() >= least_effect


@pytest.mark.parametrize("batch", [0, 1], ids=["unchunked", "chunked"])
def test_prompt_logprobs_are_those_of_the_mask(run, batch):
    for prompt, output in zip(PROMPTS, run.answers[batch], strict=True):
        ids = prompt["ids"]
        compare(run, output["prompt_logprobs"], ids, prompt["extra_args"], len(ids), slice(None))


def test_hits_are_correct_and_as_many_as_there_are_states(run):
    """In float32, an answer with a hit is also the one without it."""
    tokens: dict[tuple, list[int]] = {}
    for (description, ids, options, num_cached), (output,) in zip(TURNS, run.answers[2:], strict=True):
        print(description, output["cached"])
        assert output["cached"] == num_cached, description
        whole = ids + output["token_ids"]
        compare(run, output["logprobs"], whole, options, len(ids), slice(-NEW, None))
        mask = mask_of(star_sizes(options, len(ids)), len(whole)) if options else None
        check_greedy(output["token_ids"], reference_scores(run.model, whole, mask)[-NEW:], run.limits[0])
        if run.dtype == torch.float32:
            same = tokens.setdefault((tuple(ids), bool(options)), output["token_ids"])
            assert same == output["token_ids"], description
