"""Both schedulers without a model: steps, pages and cache hits by plan, with steps in flight for the async one."""

from __future__ import annotations

import copy

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

from starling.config.parsing import OptionError
from starling.engine_ext.engine_core import AsyncStarScheduler, StarScheduler
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import PromptPart, RequestMetadata
from tests.unit.scheduler.simulation import (
    PAGE_SIZE,
    SHAPE,
    Engine,
    answer,
    make_config,
    make_request,
    make_scheduler,
    random_ids,
    run_to_end,
)

PLAN = StarPlan(64, 64, 0, 250, 300)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(("scheduler_type", "ahead"), [(StarScheduler, 0), (AsyncStarScheduler, 1)])
def test_tokens_computed_follow_the_plans(config, scheduler_type, ahead):
    """Requests run one after the other; in the end all pages are free."""
    scheduler = make_scheduler(config, scheduler_type)
    engine = Engine(scheduler, ahead=ahead)
    full = 299 // PAGE_SIZE * PAGE_SIZE
    sequence = [  # (name, plan, prompt tokens found in the cache)
        ("dense", None, 0),
        ("star", PLAN, 64),
        ("star again", PLAN, full),
        ("dense again", None, full),
        ("shorter query", StarPlan(64, 64, 0, 290, 300), 250 // PAGE_SIZE * PAGE_SIZE),
        ("smaller anchor", StarPlan(64, 32, 0, 250, 300), 64),
    ]
    for name, plan, cached in sequence:
        engine.add(name, plan)
        engine.run()
        assert engine.computed[name] == 300 - cached + 2, name
        assert engine.cached[name] == cached, name
    assert scheduler.reset_prefix_cache()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 39


def test_only_the_async_scheduler_is_an_async_scheduler_of_vllm():
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
def test_vllms_scheduler_has_the_names_that_starling_uses(name):
    assert hasattr(Scheduler, name)


@pytest.mark.parametrize("graphs", [CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.NONE])
def test_with_decode_graphs_no_star_chunk_has_one_token(config, graphs):
    """This holds only in blocks after the first, only with full decode graphs, and not for dense requests."""
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.view.has_decode_graphs = graphs.has_full_cudagraphs()
    star, dense = make_request("star", PLAN), make_request("dense", None)
    one = 0 if scheduler.view.has_decode_graphs else 1
    for request, start, tokens, allowed in [
        (star, 100, 1, one),
        (star, 100, 2, 2),
        (star, 10, 1, 1),
        (star, 250, 1, 1),
        (star, 300, 1, 1),
        (dense, 100, 1, 1),
    ]:
        assert scheduler._reserve_prefill_lookahead(request, start, tokens) == allowed


@pytest.mark.parametrize(("v2", "refused"), [(False, 4), (True, 1)], ids=["v1", "v2"])
def test_no_star_chunk_is_taken_for_a_decode_with_drafts(config, v2, refused):
    """With three drafts, V1 takes a chunk of four tokens for a decode. It may be a prompt's last one: it can't wait."""
    scheduler = make_scheduler(config, StarScheduler, v2=v2)
    scheduler.view.has_decode_graphs, scheduler.num_spec_tokens = True, 3
    star, dense = make_request("star", PLAN), make_request("dense", None)
    for tokens in range(1, 8):
        allowed = tokens - 1 if tokens == refused else tokens
        assert scheduler._reserve_prefill_lookahead(star, 100, tokens) == allowed
        across = PLAN.head_end - tokens + 1  # the last token is the first of block 1
        assert scheduler._reserve_prefill_lookahead(star, across, tokens) == allowed
        assert scheduler._reserve_prefill_lookahead(star, across - 1, tokens) == tokens
        assert scheduler._reserve_prefill_lookahead(star, 300, tokens) == tokens
        assert scheduler._reserve_prefill_lookahead(dense, 100, tokens) == tokens


def test_room_for_drafts_behind_a_prompts_last_token_is_not_cut(config):
    """vLLM's sampler counts on all of these tokens, which the limiter would divide among long prompts."""
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.hooks["bound"] = scheduler.hooks["refuses"] = [None]
    request = make_request("star", PLAN)
    assert scheduler._reserve_prefill_lookahead(request, request.num_tokens - 1, 4) == 4


def test_server_defaults_that_do_not_fit_the_page_are_refused(config):
    """The page size of a hybrid model is known only to the scheduler, so that the engine does not start."""
    given = copy.copy(config)
    given.additional_config = {"starling": {"star": "on", "star_block_size": 96}}
    make_scheduler(given, StarScheduler)
    with pytest.raises(OptionError, match="star_block_size=96"):
        make_scheduler(given, StarScheduler, page_size=64)


@pytest.fixture(
    params=[
        MambaSpec(block_size=PAGE_SIZE, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode="align"),
        SlidingWindowSpec(block_size=PAGE_SIZE, sliding_window=40, **SHAPE),
    ],
    ids=["state", "window"],
)
def sparse_engine(config, request) -> Engine:
    """An engine that keeps a state or window at few places of a prompt, as vLLM does by default."""
    made = copy.copy(config)
    made.cache_config = copy.copy(config.cache_config)
    made.cache_config.mamba_cache_mode = "align"
    full = FullAttentionSpec(block_size=PAGE_SIZE, **SHAPE)
    scheduler = make_scheduler(made, StarScheduler, specs=[full, request.param], num_pages=400)
    scheduler.kv_cache_manager.coordinator.retention_interval = 0
    return Engine(scheduler)


def test_the_turns_of_a_chat_whose_start_other_chats_have_go_on_at_the_end_of_the_context(sparse_engine):
    """The chat's first turn shows where the chats begin to differ; its next turns must not stay one turn behind."""
    shared = random_ids(9, 200)
    for chat in range(3):
        own = random_ids(chat, 500)
        for turn in range(5):
            name, length = f"{chat}-{turn}", 300 + 100 * turn
            ids = shared + own[: length - 200]
            sparse_engine.add(name, StarPlan(64, 64, 0, length - 50, length), ids, max_tokens=1)
            sparse_engine.run()
            cached = length - sum(step.get(name, 0) for step in sparse_engine.steps)
            if turn > (chat == 1):  # the second chat's first turn kept the border of the chats instead
                assert cached == (length - 150) // PAGE_SIZE * PAGE_SIZE, name
    first_of_third = 300 - sum(step.get("2-0", 0) for step in sparse_engine.steps)
    assert first_of_third == 200 // PAGE_SIZE * PAGE_SIZE


def test_the_next_turn_of_a_chat_goes_on_at_the_end_of_the_context(sparse_engine):
    """Of a prompt vLLM keeps the state or window at its last page, whose key no other star prompt has."""
    engine = sparse_engine
    ids = random_ids(1, 300)
    for name, plan, tokens, cached in [
        ("first", PLAN, ids, 0),
        ("second", StarPlan(64, 64, 0, 350, 400), ids + random_ids(2, 100), 250 // PAGE_SIZE * PAGE_SIZE),
        ("third", StarPlan(64, 64, 0, 450, 500), ids + random_ids(2, 200), 350 // PAGE_SIZE * PAGE_SIZE),
    ]:
        engine.add(name, plan, tokens, max_tokens=1)
        engine.run()
        assert sum(step.get(name, 0) for step in engine.steps) == len(tokens) - cached, name


# The plan of a prompt that is split over two replicas. Its part here is blocks 2 and 3; the anchor is block 0.
PART_PLAN = StarPlan(64, 64, 0, 290, 300, 2)


def make_part(name: str, start: int, stop: int, plan: StarPlan | None = PART_PLAN):
    metadata = RequestMetadata(part=PromptPart(name, start, 64))
    return make_request(name, plan, stop, max_tokens=1, metadata=metadata)


@pytest.mark.parametrize(("scheduler_type", "ahead"), [(StarScheduler, 0), (AsyncStarScheduler, 1)])
def test_a_part_computes_only_its_own_blocks_and_takes_no_page_for_earlier_blocks(config, scheduler_type, ahead):
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
    # Another request hits only what the part computed: the anchor and blocks 2 and 3, not block 1.
    scheduler.add_request(make_request("whole", PART_PLAN))
    assert run_to_end(scheduler, ahead) == 300 - 64 - 128 + 2
    scheduler.add_request(make_request("dense", None))
    assert run_to_end(scheduler, ahead) == 300 - 64 + 2
    assert scheduler.reset_prefix_cache()
    assert pool.null_block.ref_cnt >= 0
    assert pool.get_num_free_blocks() == 39


def test_a_part_hits_its_own_cached_blocks_and_computes_everything_without_a_cached_anchor(config):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_part("no anchor", 128, 256))
    assert run_to_end(scheduler, 0) == 256
    scheduler.add_request(make_part("again", 128, 256))
    assert run_to_end(scheduler, 0) == PAGE_SIZE  # the last page, as vLLM computes the last token of a prompt that hits
    scheduler.add_request(make_part("further", 128, 288))
    assert run_to_end(scheduler, 0) == 32
