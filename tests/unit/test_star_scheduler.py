"""Both schedulers without a model: steps, pages and cache hits by plan, with steps in flight as async has them."""

from __future__ import annotations

import copy

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.random_llama import make_random_llama
from engine_ext import plugin
from scheduler.options import OptionError
from scheduler.plan import PLAN_KEY, StarPlan
from scheduler.share import SHARE_KEY, Part, Share
from scheduler.star_scheduler import AsyncStarScheduler, StarScheduler
from tests.parity.harness import TINY

PAGE = 32
PLAN = StarPlan(64, 64, 0, 250, 300)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    plugin.register()
    init_none_hash(get_hash_fn_by_name("sha256"))
    model = make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)
    arguments = {"max_num_batched_tokens": 100, "max_num_seqs": 4, "block_size": PAGE, "enforce_eager": True}
    made = EngineArgs(model=str(model), additional_config={"starling": {}}, **arguments).create_engine_config()
    made.cache_config.num_gpu_blocks = 40
    return made


def make_scheduler(config, scheduler_type, page=PAGE, **spec_options):
    spec = FullAttentionSpec(block_size=page, num_kv_heads=1, head_size=32, dtype=torch.float32, **spec_options)
    cache = KVCacheConfig(num_blocks=40, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return scheduler_type(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=page,
        hash_block_size=page,
        log_stats=False,
    )


def make_request(name: str, plan: StarPlan | None, length: int = 300, tokens: int = 3, **extra) -> Request:
    extra |= {} if plan is None else {PLAN_KEY: plan.to_wire()}
    return Request(
        request_id=name,
        prompt_token_ids=[index % 250 for index in range(length)],
        sampling_params=SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=extra),
        pooling_params=None,
        block_hasher=get_request_block_hasher(PAGE, get_hash_fn_by_name("sha256")),
    )


def answer(scheduled) -> ModelRunnerOutput:
    """What a runner that samples token 7 after each finished prefill gives back."""
    ids = list(scheduled.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={name: index for index, name in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
    )


def run_to_end(scheduler, ahead: int) -> int:
    """Step until nothing is left, ``ahead`` steps scheduled before the first is answered; returns computed tokens."""
    flying, computed = [], 0
    for _ in range(60):
        scheduled = scheduler.schedule()
        if scheduled.total_num_scheduled_tokens:
            computed += scheduled.total_num_scheduled_tokens
            flying.append(scheduled)
        if flying and (len(flying) > ahead or not scheduled.total_num_scheduled_tokens):
            step = flying.pop(0)
            output = answer(step)
            for index, name in enumerate(output.req_ids):
                request = scheduler.requests.get(name)
                if request is None or step_is_prefill(step, request, name):
                    output.sampled_token_ids[index] = []
            scheduler.update_from_output(step, output)
        if not flying and not scheduler.has_unfinished_requests():
            break
    assert not scheduler.has_unfinished_requests()
    return computed


def step_is_prefill(step, request, name: str) -> bool:
    starts = dict(zip(step.scheduled_cached_reqs.req_ids, step.scheduled_cached_reqs.num_computed_tokens, strict=True))
    starts |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
    return starts[name] + step.num_scheduled_tokens[name] < request.num_prompt_tokens


@pytest.mark.parametrize(("scheduler_type", "ahead"), [(StarScheduler, 0), (AsyncStarScheduler, 1)])
def test_tokens_computed_follow_the_plans(config, scheduler_type, ahead):
    """(request, prompt tokens found in the cache), one after the other; every page is free at the end."""
    scheduler = make_scheduler(config, scheduler_type)
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
        scheduler.add_request(make_request(name, plan))
        assert run_to_end(scheduler, ahead) == 300 - cached + 2, name
    assert scheduler.reset_prefix_cache()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 39


def test_async_scheduling_is_kept():
    assert issubclass(AsyncStarScheduler, AsyncScheduler)
    assert not issubclass(StarScheduler, AsyncScheduler)


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


def make_part(name: str, start: int, stop: int, plan: StarPlan | None = PART_PLAN) -> Request:
    share = Share(None, Part(name, start, 64))
    return make_request(name, plan, stop, 1, **{SHARE_KEY: share.to_wire()})


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
    scheduler.update_from_output(step, no_sample(step))
    assert 100 + run_to_end(scheduler, ahead) == 128
    # Nothing of it serves another request but what it computed: block 1 was left out, so that prompt ends there.
    scheduler.add_request(make_request("whole", PART_PLAN))
    assert run_to_end(scheduler, ahead) == 300 - 64 + 2
    scheduler.add_request(make_request("dense", None))
    assert run_to_end(scheduler, ahead) == 300 - 64 + 2
    assert scheduler.reset_prefix_cache()
    assert pool.null_block.ref_cnt >= 0
    assert pool.get_num_free_blocks() == 39


def no_sample(step) -> ModelRunnerOutput:
    output = answer(step)
    output.sampled_token_ids = [[] for _ in output.req_ids]
    return output


def test_a_part_hits_its_own_cached_blocks_and_without_its_anchor_computes_everything(config):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_part("no anchor", 128, 256))
    assert run_to_end(scheduler, 0) == 256
    scheduler.add_request(make_part("again", 128, 256))
    assert run_to_end(scheduler, 0) == PAGE  # the last page, as vLLM computes the last token of a prompt that hits
    scheduler.add_request(make_part("further", 128, 288))
    assert run_to_end(scheduler, 0) == 32
