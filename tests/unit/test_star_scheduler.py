"""Both schedulers without a model: steps, pages and cache hits by plan, with steps in flight as async has them."""

from __future__ import annotations

import copy

import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from scheduler.options import OptionError
from scheduler.plan import StarPlan
from scheduler.share import SHARE_KEY, Part, Share
from scheduler.star_scheduler import AsyncStarScheduler, StarScheduler
from tests.unit.simulation import PAGE, Engine, answer, make_config, make_request, make_scheduler, run_to_end

PLAN = StarPlan(64, 64, 0, 250, 300)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(("scheduler_type", "ahead"), [(StarScheduler, 0), (AsyncStarScheduler, 1)])
def test_tokens_computed_follow_the_plans(config, scheduler_type, ahead):
    """(request, prompt tokens found in the cache), one after the other; every page is free at the end."""
    scheduler = make_scheduler(config, scheduler_type)
    engine = Engine(scheduler, ahead=ahead)
    full = 299 // PAGE * PAGE
    sequence = [
        ("dense", None, 0),
        ("star", PLAN, 64),
        ("star again", PLAN, full),
        ("dense again", None, full),
        ("shorter query", StarPlan(64, 64, 0, 290, 300), 250 // PAGE * PAGE),
        ("smaller anchor", StarPlan(64, 32, 0, 250, 300), 64),
    ]
    for name, plan, cached in sequence:
        engine.add(name, plan)
        engine.run()
        assert engine.computed[name] == 300 - cached + 2, name
        assert engine.cached[name] == cached, name
    assert scheduler.reset_prefix_cache()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 39


def test_async_scheduling_is_kept():
    assert issubclass(AsyncStarScheduler, AsyncScheduler)
    assert not issubclass(StarScheduler, AsyncScheduler)


@pytest.mark.parametrize(
    "name",
    [
        "_reserve_prefill_lookahead",
        "_update_after_schedule",
        "_preempt_request",
        "_free_request_blocks",
        "_inflight_prefill_reserved_blocks",
        "pause_state",
    ],
)
def test_the_names_of_the_scheduler_that_are_built_on_are_there(name):
    assert hasattr(Scheduler, name)


@pytest.mark.parametrize("graphs", [CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.NONE])
def test_with_decode_graphs_no_star_chunk_of_one_token(config, graphs):
    """Only inside blocks after the first, only where graphs are in use, and never a dense request's."""
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.decode_graphs = graphs.has_full_cudagraphs()
    star, dense = make_request("star", PLAN), make_request("dense", None)
    held = 0 if scheduler.decode_graphs else 1
    for request, start, tokens, allowed in [
        (star, 100, 1, held),
        (star, 100, 2, 2),
        (star, 10, 1, 1),
        (star, 250, 1, 1),
        (star, 300, 1, 1),
        (dense, 100, 1, 1),
    ]:
        assert scheduler._reserve_prefill_lookahead(request, start, tokens) == allowed


def test_defaults_are_held_against_the_real_page(config):
    """A hybrid model's page is known only now: defaults that do not fit it keep the engine from starting."""
    given = copy.copy(config)
    given.additional_config = {"starling": {"star": {"mode": "on", "block_size": 96}}}
    make_scheduler(given, StarScheduler)
    with pytest.raises(OptionError, match="star_block_size=96"):
        make_scheduler(given, StarScheduler, page=64)


# A part of a prompt that other replicas prefill too: blocks 2 and 3 of PLAN, whose anchor is block 0.
PART_PLAN = StarPlan(64, 64, 0, 290, 300, 2)


def make_part(name: str, start: int, stop: int, plan: StarPlan | None = PART_PLAN):
    share = Share(None, Part(name, start, 64))
    return make_request(name, plan, stop, max_tokens=1, extra={SHARE_KEY: share.to_wire()})


@pytest.mark.parametrize(("scheduler_type", "ahead"), [(StarScheduler, 0), (AsyncStarScheduler, 1)])
def test_a_part_computes_its_own_blocks_and_takes_no_page_for_what_lies_before(config, scheduler_type, ahead):
    scheduler = make_scheduler(config, scheduler_type)
    pool = scheduler.kv_cache_manager.block_pool
    scheduler.add_request(make_part("anchor", 0, 64, None))
    assert run_to_end(scheduler, ahead) == 64
    scheduler.add_request(make_part("part", 128, 256))
    step = scheduler.schedule()
    pages = step.scheduled_new_reqs[0].block_ids[0]
    assert pages[2:4] == [0, 0] and 0 not in pages[:2] + pages[4:]
    assert step.num_scheduled_tokens["part"] == 100
    assert pool.num_gpu_blocks - 1 - pool.get_num_free_blocks() == len(pages) - 2
    scheduler.update_from_output(step, answer(step, {"part": []}))
    assert 100 + run_to_end(scheduler, ahead) == 128
    # Nothing of it serves another request but what it computed: the anchor and blocks 2 and 3, not block 1.
    scheduler.add_request(make_request("whole", PART_PLAN))
    assert run_to_end(scheduler, ahead) == 300 - 64 - 128 + 2
    scheduler.add_request(make_request("dense", None))
    assert run_to_end(scheduler, ahead) == 300 - 64 + 2
    assert scheduler.reset_prefix_cache()
    assert pool.null_block.ref_cnt >= 0
    assert pool.get_num_free_blocks() == 39


def test_a_part_hits_its_own_cached_blocks_and_without_its_anchor_computes_everything(config):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_part("no anchor", 128, 256))
    assert run_to_end(scheduler, 0) == 256
    scheduler.add_request(make_part("again", 128, 256))
    assert run_to_end(scheduler, 0) == PAGE  # the last page, as vLLM computes the last token of a prompt that hits
    scheduler.add_request(make_part("further", 128, 288))
    assert run_to_end(scheduler, 0) == 32
