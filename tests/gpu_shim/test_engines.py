"""Engines on a GPU that is not there: what they compute, which graphs they replay, that no step waits for the GPU."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_llama import make_random_llama
from tests.gpu_shim.harness import run_gpu_engine
from tests.parity import test_dense_heads as dense_heads
from tests.parity.harness import TINY, mask_of, max_gap, reference_logprobs, star, star_sizes
from tests.parity.test_documents import HEAD, PAGE_SIZE, Prompt, check, document

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("runner", ["v1", "v2"])]

LIMIT = 1e-4
B, C = document(11, 33), document(12, 64)
DOCUMENTS = [Prompt(HEAD, [B, C]), Prompt([], [C, B, B]), Prompt(HEAD[:20], [C])]
LAUNCHES_OF_DOCUMENTS = 2
"""Kernels and copies of an attention layer in a step in which all rows have documents; may only be lowered."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


def prompt_of(seed: int, length: int, max_tokens: int, options: dict | None = None, **fields: Any) -> dict[str, Any]:
    tokens = random.Random(seed)
    ids = [tokens.randrange(256) for _ in range(length)]
    return {"ids": ids, "extra_args": options or {}, "max_tokens": max_tokens} | fields


def expected(model: Path, prompt: dict[str, Any], output: dict[str, Any], heads: Any = ()) -> Any:
    """(tokens of prompt and output - 1,) log-probabilities."""
    ids, options = prompt["ids"] + output["token_ids"], prompt["extra_args"]
    mask = mask_of(star_sizes(options, len(prompt["ids"])), len(ids)) if options else None
    return reference_logprobs(model, ids, mask, dense_heads=heads)


def check_batch(model: Path, prompts: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output["token_ids"]) == prompt["max_tokens"]
        got = (output["prompt_logprobs"] or []) + output["logprobs"]
        assert max_gap(got, expected(model, prompt, output)[-len(got) :]) <= LIMIT


def decodes(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps with one token for each request."""
    return [step for step in steps if step["tokens"] == step["requests"]]


def test_dense_and_star_decodes_replay_full_graphs_and_split_rows_do_not(model, runner):
    """The last batch has a star prompt for whose chunk one token is left while two others decode.

    It has to wait, since such a step would replay a graph of decodes, which has no rows for it.
    """
    mixed = [
        prompt_of(1, 333, 4, star(96, 37), prompt_logprobs=True),
        prompt_of(2, 200, 6, star(64, 1, anchor_size=32, overlap_size=64), prompt_logprobs=True),
        prompt_of(3, 100, 5, prompt_logprobs=True),
    ]
    of_decodes = [prompt_of(seed, 20 + seed, tokens) for seed, tokens in ((4, 3), (5, 7), (6, 5), (7, 7), (8, 7))]
    first_block = [prompt_of(11, 33, 1)]
    waiting = prompt_of(11, 60, 2, star(32, 5, anchor_size=0))
    squeezed = [prompt_of(9, 3, 8), prompt_of(10, 3, 8), waiting]
    batches = [mixed, of_decodes, first_block, {"chunk": 3}, squeezed]
    result = run_gpu_engine(model, batches, max_num_batched_tokens=200, runner=runner)
    for prompts, outputs in zip((mixed, of_decodes, first_block, squeezed), result["batches"], strict=True):
        check_batch(model, prompts, outputs)
    for steps in result["steps"]:
        assert not any(step["replayed"] for step in steps if step["rewritten"] or step not in decodes(steps))
    of_mixed, of_dense, _, of_squeezed = ([step for step in steps if step["replayed"]] for steps in result["steps"])
    assert of_mixed
    assert [step["requests"] for step in of_dense] == [5, 5, 4, 4, 3, 3], "padded, and rows of requests that have ended"
    assert sum(step["requests"] == 2 for step in of_squeezed) >= 5, "the star prompt does not wait"
    assert any(step["rewritten"] for step in result["steps"][3])


def check_documents(model: Path, outputs: list[dict[str, Any]]) -> None:
    for prompt, output in zip(DOCUMENTS, outputs, strict=False):
        check(model, prompt, output)


def test_documents_beside_other_prompts_and_alone(model, runner):
    """Batches whose rows end one after the other, so that each is padded to the sizes of the graphs.

    At last, a step may have few documents in a full graph: those of more run in none.
    """
    lengths = (3, 6, 4)
    requests = [prompt.request(max_tokens=tokens) for prompt, tokens in zip(DOCUMENTS, lengths, strict=True)]
    others = [prompt_of(3, 100, 5), prompt_of(2, 130, 3, star(64, 10))]
    dense = [prompt_of(seed, 20 + seed, tokens) for seed, tokens in ((4, 2), (5, 5), (6, 4))]
    mixed = [requests[0] | {"prompt_logprobs": True}, *requests[1:], *others]
    limit = {"call": "tests.gpu_shim.worker:leave_room_for_few_ranges"}
    batches = [mixed, dense, requests, limit, requests]
    result = run_gpu_engine(model, batches, star={"star_segments": "auto"}, max_num_batched_tokens=400, runner=runner)
    of_mixed, of_dense, of_requests, of_many = result["batches"]
    check_documents(model, of_mixed)
    check_documents(model, of_requests)
    check_documents(model, of_many)
    check_batch(model, others, of_mixed[len(DOCUMENTS) :])
    check_batch(model, dense, of_dense)
    assert min(output["cached"] for output in of_requests) >= PAGE_SIZE
    *with_room, without = (decodes(steps) for steps in result["steps"])
    assert all(step["replayed"] for steps in with_room for step in steps)
    assert {step["requests"] for step in without if step["replayed"]} == {1}
    assert {step["requests"] for step in without if not step["replayed"]} == {2, 3}
    for steps in (with_room[2], without):
        of_documents = [step for step in steps if step["rerotated"]]
        assert all(step["copies"] for step in of_documents), "the host may change what they read, and no test would see"
        assert {step["requests"] for step in of_documents} == {1, 2, 3}
        assert max(max(step["launches"]) for step in of_documents) <= LAUNCHES_OF_DOCUMENTS


def test_dense_heads_of_star_prompts(tmp_path, runner):
    model = make_random_llama(tmp_path / "tiny", **dense_heads.SIZES)
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"scores": dense_heads.SCORES}))
    prompts = [prompt_of(1, 150, 3), prompt_of(3, 190, 3, star(64, 9), prompt_logprobs=True)]
    for share in (0.25, 0.5):
        options = star(64, 10) | {"star_dense_heads": share}
        prompts.append(prompt_of(2, 200, 4, options, prompt_logprobs=True))
    shares = [0, 0, 0.25, 0.5]
    result = run_gpu_engine(
        model, [prompts], star={"star_heads": str(scores)}, max_num_batched_tokens=300, runner=runner
    )
    for prompt, share, output in zip(prompts, shares, result["batches"][0], strict=True):
        got = (output["prompt_logprobs"] or []) + output["logprobs"]
        wanted = expected(model, prompt, output, dense_heads.DENSE[share])
        assert max_gap(got, wanted[-len(got) :]) <= LIMIT
    assert all(step["replayed"] for step in decodes(result["steps"][0]) if not step["rewritten"])


def test_layers_with_a_window_beside_layers_without(tmp_path, runner):
    """As Gemma 3 and gpt-oss have them: two groups of the KV cache, of which star rows are those of one."""
    model = dense_heads.make_windowed(tmp_path / "model", "WF")
    prompts = [
        prompt_of(1, 333, 4, star(96, 37), prompt_logprobs=True),
        prompt_of(3, 150, 6, prompt_logprobs=True),
        prompt_of(4, 20, 5),
    ]
    result = run_gpu_engine(model, [prompts], max_num_batched_tokens=200, runner=runner)
    check_batch(model, prompts, result["batches"][0])
    assert any(step["rewritten"] for step in result["steps"][0])
    assert all(step["replayed"] for step in decodes(result["steps"][0]) if not step["rewritten"])
