"""The cache state and the prefill progress after each step of a scheduler, without a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.request import RequestStatus

from starling.engine_ext.engine_core import AsyncStarScheduler, StarScheduler
from starling.scheduler import provenance
from starling.scheduler.cache_state import cache_state, group_state, prefill_progress
from starling.scheduler.planning.plan import StarPlan, blocks_done
from starling.scheduler.planning.request_metadata import PromptPart, RequestMetadata
from starling.v1.admin_pb2 import EngineCache
from starling.vllm_compat.kv_pages import CacheGroup
from tests.unit.scheduler.simulation import PAGE_SIZE, answer, make_request, make_scheduler
from tests.unit.scheduler.test_star_scheduler import PLAN, config

__all__ = ["config"]

TOTAL = 39  # 40 blocks without vLLM's null page


def pages(scheduler) -> tuple[int, int, int]:
    """(used, cached, free) pages. Asserts that they add up."""
    state = cache_state(scheduler, per_request=False)
    found = state["pages_used"], state["pages_cached"], state["pages_free"]
    assert sum(found) == state["pages_total"] == TOTAL
    (group,) = state["groups"]
    assert (group["pages_used"], group["pages_cached"]) == found[:2]
    return found


def step(scheduler) -> None:
    scheduled = scheduler.schedule()
    done = {name: request.num_computed_tokens >= request.num_tokens for name, request in scheduler.requests.items()}
    scheduler.update_from_output(scheduled, answer(scheduled, {name: [7] if done[name] else [] for name in done}))


def counts(scheduler) -> tuple[int, int]:
    state = cache_state(scheduler, per_request=False)
    return state["requests_running"], state["requests_waiting"]


@pytest.mark.parametrize("scheduler_type", [StarScheduler, AsyncStarScheduler])
def test_pages_during_and_after_a_request(config, scheduler_type):
    """300 prompt tokens in steps of 100 and 3 output tokens, over pages of 32."""
    scheduler = make_scheduler(config, scheduler_type)
    assert (pages(scheduler), counts(scheduler)) == ((0, 0, 39), (0, 0))
    scheduler.add_request(make_request("first", None))
    assert (pages(scheduler), counts(scheduler)) == ((0, 0, 39), (0, 1))
    for used in (4, 7, 10):
        step(scheduler)
        assert (pages(scheduler), counts(scheduler)) == ((used, 0, 39 - used), (1, 0))
    while scheduler.has_unfinished_requests():
        step(scheduler)
    assert (pages(scheduler), counts(scheduler)) == ((0, 9, 30), (0, 0)), "nine full pages can be hit"

    scheduler.add_request(make_request("again", None))
    step(scheduler)
    assert pages(scheduler) == (10, 0, 29), "nine pages that were hit and a new one"
    scheduler.add_request(make_request("beside", None))
    step(scheduler)
    used, _, _ = pages(scheduler)
    assert used == 11, "a page that two requests hold counts once"

    (request, *_) = scheduler.running
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    assert request.status is RequestStatus.PREEMPTED
    assert (pages(scheduler)[0], counts(scheduler)) == (10, (1, 1))

    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert (pages(scheduler), counts(scheduler)) == ((0, 9, 30), (0, 0))
    assert scheduler.reset_prefix_cache()
    assert pages(scheduler) == (0, 0, 39)


def test_the_state_of_each_request(config):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_request("star", PLAN))
    scheduler.add_request(make_request("behind", None))
    assert cache_state(scheduler, per_request=True)["requests"] == [], "no request runs or holds a page"
    step(scheduler)
    (found,) = cache_state(scheduler, per_request=True)["requests"]
    assert found == {
        "engine_request_id": "star",
        "status": "running",
        "computed_tokens": 100,
        "prompt_tokens": 300,
        "cached_tokens": 0,
        "groups": [{"pages": 4, "states": 100}],
    }
    while scheduler.requests["star"].num_output_tokens == 0:
        step(scheduler)
    (found,) = cache_state(scheduler, per_request=True)["requests"]
    assert "cached_tokens" not in found, "vLLM reports it with the first token only"


def test_the_state_and_the_metrics_of_a_compressed_cache(config, monkeypatch):
    """With eight tokens a state, 165 tokens are 20 states. The metric counts them until the request ends."""
    monkeypatch.setattr(config.cache_config, "kv_cache_size_tokens", 9000)
    scheduler = make_scheduler(config, StarScheduler, page_size=128, tokens_per_state=8)
    gauges = provenance.cache_metrics()
    row = 2 * 32 * 4
    sizes = {"capacity_tokens": 9000, "uncompressed_capacity_tokens": TOTAL * 16}
    assert {name: cache_state(scheduler, per_request=False)[name] for name in sizes} == sizes
    assert gauges.bytes_per_token.labels("0", "full_attention")._value.get() == row / 8
    assert [gauges.capacity.labels(cache)._value.get() for cache in ("compressed", "uncompressed")] == [*sizes.values()]
    for name in ("one", "two"):
        scheduler.add_request(make_request(name, None, ids=165))
    while any(request.num_output_tokens == 0 for request in scheduler.requests.values()):
        step(scheduler)
    state = cache_state(scheduler, per_request=True)
    assert [request["groups"][0]["states"] for request in state["requests"]] == [20, 20]
    message = EngineCache(**state)
    assert message.groups[0].states_used == gauges.states._value.get() == 40
    assert (message.groups[0].bytes_per_token, message.capacity_tokens) == (row / 8, 9000)
    while scheduler.has_unfinished_requests():
        step(scheduler)
    assert gauges.states._value.get() == 0


def test_states_are_plain_numbers_and_names(config):
    """msgpack then sends them between the processes without pickle."""
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_request("star", PLAN))
    step(scheduler)

    def check(value) -> None:
        if isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                check(item)
        else:
            assert type(value) in (int, float, str)

    check(cache_state(scheduler, per_request=True))
    check(prefill_progress(scheduler, ["star"]))


BYTES = PAGE_SIZE * 2 * 32 * 4  # tokens, K and V, 32 values of one head, 4 bytes


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32),
            ("full_attention", 2 * BYTES, PAGE_SIZE, 1.0, 1.0),
        ),
        (
            FullAttentionSpec(
                block_size=PAGE_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32, tokens_per_state=8
            ),
            ("full_attention", 2 * BYTES // 8, PAGE_SIZE // 8, 8.0, 8.0),
        ),
        (
            SlidingWindowSpec(
                block_size=PAGE_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32, sliding_window=100
            ),
            ("sliding_window", 2 * BYTES, PAGE_SIZE, 1.0, 1.0),
        ),
        (
            MambaSpec(block_size=PAGE_SIZE, shapes=((16, 4),), dtypes=(torch.float32,)),
            ("mamba", 2 * 16 * 4 * 4, 1, None, None),
        ),
    ],
    ids=["full", "compressed", "sliding window", "mamba"],
)
def test_the_state_of_a_group(spec, expected):
    manager = SimpleNamespace(block_size=PAGE_SIZE, req_to_blocks={})
    state = group_state(CacheGroup(["one", "two"], spec, manager))
    names = ("kind", "page_bytes", "page_states", "tokens_per_state", "compression")
    assert tuple(state.get(name) for name in names) == expected
    assert (state["layers"], state["page_tokens"]) == (2, PAGE_SIZE)


def progress(scheduler, name: str) -> tuple[int, int, int]:
    state = prefill_progress(scheduler, [name])[name]
    assert (state["prompt"], state["star_blocks"]) == (300, 4 if state["context"] else 0)
    return state["computed"], state["cached"], state["star_blocks_done"]


def test_progress_of_a_star_prompt(config):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_request("star", PLAN))
    states = [progress(scheduler, "star")]
    for _ in range(4):
        step(scheduler)
        states.append(progress(scheduler, "star"))
    assert states == [(0, 0, 0), (100, 0, 1), (200, 0, 3), (300, 0, 4), (300, 0, 4)]
    assert prefill_progress(scheduler, ["star"])["star"]["context"] == PLAN.context_end
    while scheduler.has_unfinished_requests():
        step(scheduler)
    assert prefill_progress(scheduler, ["star", "unknown"]) == {}

    scheduler.add_request(make_request("dense", None))
    step(scheduler)
    assert progress(scheduler, "dense") == (164, 64, 0), "block 0 was cached"


def test_progress_of_a_part_counts_only_its_own_tokens(config):
    def part(name: str, start: int, stop: int, plan: StarPlan | None = PLAN):
        metadata = RequestMetadata(part=PromptPart(name, start, 64))
        return make_request(name, plan, stop, max_tokens=1, metadata=metadata)

    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(part("anchor", 0, 64, None))
    assert prefill_progress(scheduler, ["anchor"]) == {}
    while scheduler.has_unfinished_requests():
        step(scheduler)
    scheduler.add_request(part("part", 128, 250))
    states = [prefill_progress(scheduler, ["part"])["part"]]
    step(scheduler)
    states.append(prefill_progress(scheduler, ["part"])["part"])
    assert [(state["computed"], state["cached"], state["star_blocks_done"]) for state in states] == [
        (0, 0, 0),
        (100, 0, 1),
    ]
    assert all((state["prompt"], state["star_blocks"], state["part"]) == (300, 4, 1) for state in states)


def test_progress_does_not_count_tokens_of_steps_in_flight(config):
    scheduler = make_scheduler(config, AsyncStarScheduler)
    scheduler.add_request(make_request("star", PLAN))
    in_flight = [scheduler.schedule(), scheduler.schedule()]
    assert scheduler.requests["star"].num_computed_tokens == 200
    states = [progress(scheduler, "star")[0]]
    for scheduled in in_flight:
        scheduler.update_from_output(scheduled, answer(scheduled, {"star": []}))
        states.append(progress(scheduler, "star")[0])
    assert states == [0, 100, 200]


@pytest.mark.parametrize(("computed", "done"), [(0, 0), (63, 0), (64, 1), (249, 3), (250, 4), (300, 4)])
def test_blocks_done(computed, done):
    assert blocks_done(StarPlan(64, 64, 0, 250, 300), computed) == done
