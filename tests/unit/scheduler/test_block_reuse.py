"""Cached star blocks that are adopted behind a hole: how many tokens are computed, and that each page is right."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import RequestStatus

from starling.engine_ext.engine_core import AsyncStarScheduler, StarScheduler
from starling.features.reuse.core import BlockReuse
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.provenance import scheduler_metrics
from tests.unit.scheduler.simulation import Engine, make_config, make_scheduler, random_ids

PAGE_SIZE, BLOCK, BLOCKS, QUERY, NEW = 8, 32, 6, 13, 3
CONTEXT = BLOCK * BLOCKS - 5  # the last star block is shorter
LENGTH = CONTEXT + QUERY
PLAN = StarPlan(BLOCK, BLOCK, 0, CONTEXT, LENGTH)
QUERY_COST = LENGTH - CONTEXT // PAGE_SIZE * PAGE_SIZE  # the query, and the context tokens on its first page

KINDS = {
    "v1": (StarScheduler, False, 0),
    "v2": (StarScheduler, True, 0),
    "async v1": (AsyncStarScheduler, False, 1),
    "async v2": (AsyncStarScheduler, True, 1),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("models"), block_size=PAGE_SIZE)


@pytest.fixture(params=KINDS)
def engine(request, config):
    return make_engine(config, request.param)


def make_engine(config, kind: str, num_pages: int = 100) -> Engine:
    scheduler_type, v2, ahead = KINDS[kind]
    return Engine(make_scheduler(config, scheduler_type, PAGE_SIZE, num_pages, v2), ahead=ahead, page_size=PAGE_SIZE)


def edited(ids: list[int], *blocks: int) -> list[int]:
    """The prompt with another token in the middle of each of these star blocks."""
    changed = list(ids)
    for block in blocks:
        changed[block * BLOCK + BLOCK // 2] = 251
    return changed


def repeated(seed: int) -> list[int]:
    """A prompt whose star blocks all have the same tokens."""
    return (random_ids(seed, BLOCK) * (BLOCKS + 1))[:LENGTH]


def finish(engine: Engine) -> None:
    """Run all requests, and assert that no page is held at the end."""
    engine.run()
    engine.check_pages()
    assert engine.scheduler.reset_prefix_cache()


def forget_step(scheduler, name: str) -> None:
    """Do for a preempted request what vLLM's reset does; V1 alone has the step's requests in the scheduler."""
    getattr(scheduler, "prev_step_scheduled_req_ids", set()).discard(name)


def block_cost(block: int) -> int:
    """Tokens to compute of a block that is edited in its middle: all from the page of the edit on."""
    end = min((block + 1) * BLOCK, CONTEXT // PAGE_SIZE * PAGE_SIZE)
    return end - (block * BLOCK + BLOCK // 2)


@pytest.mark.parametrize("blocks", [(1,), (3,), (5,), (2, 4), (1, 2, 5), ()], ids=str)
def test_only_the_rest_of_an_edited_block_and_the_query_are_computed(engine, blocks):
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    request = engine.add("second", PLAN, edited(ids, *blocks))
    engine.run()
    cost = sum(map(block_cost, blocks)) + QUERY_COST if blocks else LENGTH - (LENGTH - 1) // PAGE_SIZE * PAGE_SIZE
    assert engine.computed["second"] == cost + NEW - 1
    assert engine.cached["second"] == LENGTH - cost
    assert request.num_preemptions == 0
    assert (engine.hits, engine.queries) == (LENGTH - cost, 2 * LENGTH)
    finish(engine)


def test_a_block_with_the_same_tokens_at_another_position_is_not_reused(engine):
    engine.add("first", PLAN, repeated(1))
    engine.run()
    assert engine.computed["first"] == LENGTH + NEW - 1
    finish(engine)


def test_no_block_is_reused_behind_another_anchor(engine):
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    engine.add("second", PLAN, [*ids[:3], 251, *ids[4:]])
    engine.run()
    assert engine.cached["second"] == 0
    assert engine.computed["second"] == LENGTH + NEW - 1
    finish(engine)


def test_an_edit_of_block_0_behind_a_smaller_anchor_keeps_all_other_blocks(engine):
    plan = StarPlan(BLOCK, PAGE_SIZE, 0, CONTEXT, LENGTH)
    ids = random_ids(1, LENGTH)
    engine.add("first", plan, ids)
    engine.run()
    engine.add("second", plan, edited(ids, 0))
    engine.run()
    assert engine.cached["second"] == LENGTH - BLOCK // 2 - QUERY_COST
    finish(engine)


def test_blocks_without_an_anchor_are_reused_behind_any_block_0_of_the_same_tenant(engine):
    plan = StarPlan(BLOCK, 0, 0, CONTEXT, LENGTH)
    ids = random_ids(1, LENGTH)
    other = [251, *ids[1:]]
    engine.add("first", plan, ids, cache_salt="a")
    engine.run()
    engine.add("same tenant", plan, other, cache_salt="a")
    engine.add("other tenant", plan, other, cache_salt="b")
    engine.run()
    assert engine.cached["same tenant"] == LENGTH - BLOCK - QUERY_COST
    assert engine.cached["other tenant"] == 0
    finish(engine)


@pytest.mark.parametrize(
    ("plan", "cached"),
    [(None, 80), (StarPlan(BLOCK, BLOCK, PAGE_SIZE, CONTEXT, LENGTH), 80)],
    ids=["dense", "overlap"],
)
def test_prompts_with_dependent_pages_reuse_only_their_start(engine, plan, cached):
    ids = random_ids(1, LENGTH)
    engine.add("first", plan, ids)
    engine.run()
    engine.add("second", plan, edited(ids, 2))
    engine.run()
    assert engine.cached["second"] == cached
    assert not engine.scheduler.part(BlockReuse).requests
    finish(engine)


def test_with_the_option_off_a_prompt_hits_only_its_start(config, tmp_path):
    off = make_config(tmp_path, {"scheduler": {"star_block_reuse": "off"}}, block_size=PAGE_SIZE)
    engine = make_engine(off, "v1")
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    engine.add("second", PLAN, edited(ids, 2))
    engine.run()
    assert engine.scheduler.part(BlockReuse) is None
    assert engine.cached["second"] == 2 * BLOCK + BLOCK // 2
    make_engine(config, "v1")  # restores the request hasher for later tests


def test_only_an_evicted_block_is_computed_again(engine):
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    hashes = engine.add("probe", PLAN, ids).block_hashes
    (page,) = engine.pool.get_cached_block(hashes[3 * BLOCK // PAGE_SIZE], [0])
    engine.pool.evict_blocks({page.block_id})
    engine.run()
    assert engine.cached["probe"] == (LENGTH - 1) // PAGE_SIZE * PAGE_SIZE - BLOCK
    finish(engine)


def test_concurrent_requests_adopt_blocks_of_one_another(engine):
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.add("second", PLAN, edited(ids, 5))
    engine.add("third", PLAN, edited(ids, 1))
    engine.run()
    total = sum(engine.computed.values())
    assert total < 2.2 * LENGTH
    finish(engine)


def test_a_preemption_discards_adopted_pages_that_are_not_reported_yet(engine):
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    request = engine.add("second", PLAN, edited(ids, 1, 4))
    engine.step()
    engine.scheduler.part(BlockReuse).adopt_all()  # the adopted pages are not reported to the worker yet
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0, drop_stale_output=True)
    forget_step(engine.scheduler, "second")
    assert not engine.scheduler.part(BlockReuse).unreported
    engine.check_pages()
    engine.run()
    assert engine.first_token["second"]
    finish(engine)


def test_a_reset_that_preempts_all_requests_leaves_no_cached_page(engine):
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    engine.add("second", PLAN, edited(ids, 2))
    engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert engine.computed["second"] >= LENGTH + NEW - 1
    finish(engine)


def test_with_decode_graphs_no_chunk_of_one_token_ends_at_a_cached_block(config):
    engine = make_engine(config, "v1")
    engine.scheduler.view.has_decode_graphs = True
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    request = engine.add("second", PLAN, edited(ids, 2))
    clip = engine.scheduler._reserve_prefill_lookahead
    assert clip(request, 3 * BLOCK - 1, 20) == 20
    assert clip(request, 3 * BLOCK - 2, 20) == 2
    finish(engine)


def test_kv_events_report_adopted_blocks(engine, monkeypatch):
    manager, reported = engine.scheduler.kv_cache_manager, set()
    take = manager.take_events

    def take_events():
        events = take()
        reported.update(key for event in events or () for key in event.block_hashes)
        return events

    monkeypatch.setattr(manager, "take_events", take_events)
    engine.pool.enable_kv_cache_events = True
    ids = random_ids(1, LENGTH)
    first = engine.add("first", PLAN, ids)
    engine.run()
    stored = set(reported)
    assert len(stored) == len(first.block_hashes) == LENGTH // PAGE_SIZE
    reported.clear()
    engine.add("quiet", PLAN, edited(ids, 2))
    engine.run()
    assert reported
    assert not reported & stored
    reported.clear()
    request = engine.add("full", PLAN, edited(ids, 3))
    request.kv_cache_report_mode = "full"
    engine.run()
    assert len(reported & stored) == engine.cached["full"] // PAGE_SIZE
    finish(engine)


def adopted_tokens() -> float:
    return scheduler_metrics().cached_tokens.labels("block")._value.get()


class Machine(RuleBasedStateMachine):
    """Admits, edits, steps, preempts, aborts and evicts in any order, with few pages."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.engine: Engine | None = None
        self.count = 0

    @precondition(lambda self: self.engine is None)
    @rule(kind=st.sampled_from(list(KINDS)), num_pages=st.sampled_from([30, 45, 80]))
    def start(self, kind, num_pages):
        self.engine = make_engine(self.config, kind, num_pages)
        before = adopted_tokens()
        for name, ids in ("r0", random_ids(1, LENGTH)), ("r0-edited", edited(random_ids(1, LENGTH), 2)):
            self.engine.add(name, PLAN, ids)
            self.engine.run()
        assert adopted_tokens() > before  # whatever is drawn, each example adopts blocks

    @precondition(lambda self: self.engine is not None)
    @rule(
        document=st.integers(1, 2),
        blocks=st.sets(st.integers(0, BLOCKS - 1), max_size=2),
        plan=st.sampled_from(
            [PLAN, PLAN, StarPlan(BLOCK, PAGE_SIZE, 0, CONTEXT - 9, LENGTH), StarPlan(BLOCK, 0, 0, 150, 192)]
        )
        | st.sampled_from([None, StarPlan(BLOCK, BLOCK, PAGE_SIZE, CONTEXT, LENGTH)]),
    )
    def admit(self, document, blocks, plan):
        if len(self.engine.scheduler.requests) < 6:
            self.count += 1
            ids = edited(random_ids(1, LENGTH) if document == 1 else repeated(2), *blocks)
            self.engine.add(f"r{self.count}", plan, ids[: plan.num_prompt_tokens] if plan else ids)

    @precondition(lambda self: self.engine is not None)
    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: self.engine is not None and self.engine.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data):
        scheduler = self.engine.scheduler
        request = data.draw(st.sampled_from(scheduler.running))
        scheduler.running.remove(request)
        scheduler._preempt_request(request, 0.0, drop_stale_output=True)
        forget_step(scheduler, request.request_id)

    @precondition(lambda self: self.engine is not None and self.engine.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(list(self.engine.scheduler.requests)))
        self.engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    @precondition(lambda self: self.engine is not None)
    @rule(page_id=st.integers(1, 29))
    def evict(self, page_id):
        if self.engine.pool.blocks[page_id].ref_cnt == 0:
            self.engine.pool.evict_blocks({page_id})

    @precondition(lambda self: self.engine is not None)
    @rule()
    def reset(self):
        self.engine.scheduler.reset_prefix_cache()

    @invariant()
    def reference_counts_are_right(self):
        if self.engine is not None:
            self.engine.check_pages()

    def teardown(self):
        if self.engine is not None:
            finish(self.engine)
            assert not self.engine.scheduler.part(BlockReuse).unreported


def test_no_page_is_leaked_freed_twice_or_read_in_place_of_another(config):
    Machine.config = config
    limits = settings(max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machine, settings=limits)


@pytest.mark.skipif(not hasattr(KVCacheManager, "get_num_cached_tokens"), reason="before vLLM 0.34")
def test_requests_with_cached_blocks_behind_an_edit_are_admitted_first(tmp_path):
    """With --cache-aware-admission-window; vLLM alone counts the pages before the edit."""
    window = {"cache_aware_admission_window": 8, "cache_aware_admission_threshold": 0.0, "max_num_seqs": 1}
    engine = Engine(
        make_scheduler(make_config(tmp_path, block_size=PAGE_SIZE, **window), StarScheduler, PAGE_SIZE, 100),
        page_size=PAGE_SIZE,
    )
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    engine.add("longer prefix", PLAN, edited(ids, 2, 3, 4, 5))
    engine.add("more cached", PLAN, edited(ids, 1))
    engine.run()
    assert engine.cached["more cached"] > engine.cached["longer prefix"] > 2 * BLOCK
    assert engine.first_token["more cached"] < engine.first_token["longer prefix"]
    finish(engine)


@pytest.mark.skipif(not hasattr(KVCacheManager, "get_num_cached_tokens"), reason="before vLLM 0.34")
def test_a_request_for_logprobs_of_its_prompt_reads_no_page_behind_the_first_scored_token(engine):
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    scored = {"prompt_logprobs": 0, "prompt_logprob_start": BLOCK, "skip_reading_prefix_cache": False}
    engine.add("second", PLAN, edited(ids, 2), sampling=scored)
    engine.run()
    assert engine.cached["second"] == BLOCK // PAGE_SIZE * PAGE_SIZE
    finish(engine)
