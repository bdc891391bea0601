"""Prompts with an edited middle: reused star blocks give the results of a cold run, in both model runners."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import TINY, mask_of, max_gap, reference_logprobs, run_engine, star, star_sizes, v2_env

pytestmark = pytest.mark.engine

PAGE_SIZE, BLOCK, QUERY, TOKENS, NEW, LIMIT = 32, 128, 5, 900, 4, 1e-5
CONTEXT = TOKENS - QUERY
WHOLE_PAGES = CONTEXT // PAGE_SIZE * PAGE_SIZE  # tokens of the context in whole pages
LAST = CONTEXT // BLOCK  # the last block, shorter than the others
STAR = star(BLOCK, QUERY)
SMALL_ANCHOR = star(BLOCK, QUERY, anchor_size=PAGE_SIZE)


def document(seed: int) -> list[int]:
    tokens = random.Random(seed)
    return [tokens.randrange(255) for _ in range(TOKENS)]


def edited(ids: list[int], *blocks: int, token: int = 255) -> list[int]:
    changed = list(ids)
    for block in blocks:
        changed[block * BLOCK + BLOCK // 2] = token
    return changed


def cached(*blocks: int) -> int:
    """Cached tokens if these blocks were edited in their middle: all except the second half of each, and the query."""
    ends = [min((block + 1) * BLOCK, WHOLE_PAGES) for block in blocks]
    computed = sum(end - (block * BLOCK + BLOCK // 2) for block, end in zip(blocks, ends, strict=True))
    return WHOLE_PAGES - computed


def prompt(ids: list[int], options: dict = STAR, cold: bool = False) -> dict[str, Any]:
    return {"ids": ids, "extra_args": options, "max_tokens": NEW, "cold": cold}


def evict_block_three(scheduler: Any) -> None:
    """Evict the first page of star block 3 of the last request."""
    keys = scheduler.reuse_test_keys
    (page,) = scheduler.kv_cache_manager.block_pool.get_cached_block(keys[3 * BLOCK // PAGE_SIZE], [0])
    scheduler.kv_cache_manager.evict_blocks({page.block_id})


def keep_keys(scheduler: Any) -> None:
    """From now on, keep the page keys of the last added request."""
    add = scheduler.add_request

    def add_request(request: Any) -> None:
        scheduler.reuse_test_keys = list(request.block_hashes)
        add(request)

    scheduler.add_request = add_request


def preempt_in_the_middle(scheduler: Any) -> None:
    """Preempt the next request once, after two steps. By then it has adopted the blocks up to the second edit."""
    schedule = scheduler.schedule
    steps = []

    def schedule_or_preempt(*args: Any) -> Any:
        if scheduler.running and len(steps) < 2:
            steps.append(scheduler.running[0].num_computed_tokens)
            if len(steps) == 2:
                request = scheduler.running.pop()
                scheduler._preempt_request(request, 0.0)
        return schedule(*args)

    scheduler.schedule = schedule_or_preempt


def call(function: Any) -> dict[str, str]:
    return {"scheduler": f"{__name__}:{function.__name__}"}


def sequence(short: bool) -> list[tuple[str, list[dict] | dict, list[int]]]:
    """(description, batch, expected cached tokens of each prompt), to run in order on one engine."""
    first, second = document(1), document(2)
    other_anchor = [255, *first[1:]]
    steps: list[tuple[str, list[dict] | dict, list[int]]] = [
        ("cold", [prompt(first)], [0]),
        ("a middle block", [prompt(edited(first, 3))], [cached(3)]),
        ("two blocks", [prompt(edited(first, 2, 5))], [cached(2, 5)]),
        ("the anchor", [prompt(other_anchor)], [0]),
    ]
    if short:
        return steps
    return [
        *steps,
        ("the first after the anchor", [prompt(edited(first, 1))], [cached(1)]),
        ("the last block", [prompt(edited(first, LAST))], [cached(LAST)]),
        ("small anchor, cold", [prompt(second, SMALL_ANCHOR)], [0]),
        ("block 0 after a small anchor", [prompt(edited(second, 0), SMALL_ANCHOR)], [cached(0)]),
        (
            "two in flight",
            [prompt(edited(first, 1, 4, token=254)), prompt(edited(first, 2, LAST, token=254))],
            [cached(1, 4), cached(2, LAST)],
        ),
        ("keep keys", call(keep_keys), []),
        ("again", [prompt(first)], [(TOKENS - 1) // PAGE_SIZE * PAGE_SIZE]),
        ("evict", call(evict_block_three), []),
        ("a block evicted between", [prompt(first)], [(TOKENS - 1) // PAGE_SIZE * PAGE_SIZE - BLOCK]),
        ("preempt", call(preempt_in_the_middle), []),
        ("preempted in the middle", [prompt(edited(first, 3, 5, token=254))], [5 * BLOCK]),
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@functools.cache
def reference(model: Any, ids: tuple[int, ...], options: tuple, prompt_tokens: int) -> torch.Tensor:
    mask = mask_of(star_sizes(dict(options), prompt_tokens), len(ids)) if options else None
    return reference_logprobs(model, list(ids), mask)[-NEW:]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_reused_blocks_give_the_results_of_a_cold_run(model, runner):
    steps = sequence(short=runner == "v2")
    warm = [step for step in steps if isinstance(step[1], list)]
    cold = [[one | {"cold": True}] for _, batch, _ in warm for one in batch]
    env = {"v1": None, "v2": v2_env()}[runner]
    result = run_engine(model, [batch for _, batch, _ in steps] + cold, max_num_batched_tokens=300, env=env)
    cold_results = iter(result["batches"][len(warm) :])
    for (description, batch, expected_cached), outputs in zip(warm, result["batches"], strict=False):
        for one, num_cached, output in zip(batch, expected_cached, outputs, strict=True):
            (cold_output,) = next(cold_results)
            assert output["cached"] == num_cached, description
            assert cold_output["cached"] == 0
            assert output["token_ids"] == cold_output["token_ids"], description
            assert max_gap(output["logprobs"], torch.tensor(cold_output["logprobs"])) <= LIMIT, description
            ids = tuple(one["ids"] + output["token_ids"])
            expected = reference(model, ids, tuple(one["extra_args"].items()), TOKENS)
            assert max_gap(output["logprobs"], expected) <= 1e-4, description
            assert max_gap(output["logprobs"], reference(model, ids, (), TOKENS)) > 1e-2, description
    metrics = result["metrics"]
    assert metrics["vllm:num_preemptions"] == (1 if runner == "v1" else 0), "an adoption does not count as preemption"
    assert metrics["vllm:prefix_cache_hits"] == sum(one["cached"] for batch in result["batches"] for one in batch)
