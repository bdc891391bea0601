"""The division of a step among prompts: the functions alone, and a scheduler without a model compared to vLLM's."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from starling.config.parsing import OptionError
from starling.config.scheduling import SchedulingOptions, parse_scheduling
from starling.engine_ext.engine_core import StarScheduler
from starling.features.fairness.core import PrefillLimiter
from starling.features.fairness.step_budget import Limits, LongPrompt, attended, chunk_within, divide_step, make_limits
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.provenance import scheduler_metrics
from tests.unit.scheduler.simulation import SHAPE, Engine, make_scheduler, random_ids
from tests.unit.scheduler.steps import LONG, PAGE_SIZE, STEP, add_long, make_engine, make_step_config, throttle

LIMITS = Limits(step_tokens=256, long_prompt=256, shared_tokens=64, shared_keys=64 * 1000)
PLAN = StarPlan(512, 512, 0, LONG - 32, LONG)


# The functions.


@given(
    start=st.integers(0, 900),
    tokens=st.integers(1, 400),
    keys=st.integers(0, 300_000),
    star=st.booleans(),
)
def test_a_chunk_is_the_longest_within_its_limit_of_keys(start, tokens, keys, star):
    plan = StarPlan(128, 64, 0, 1200, 1400) if star else None
    chunk = chunk_within(plan, start, tokens, keys)
    assert 0 <= chunk <= tokens
    assert attended(plan, start, start + chunk) <= keys
    assert chunk == tokens or attended(plan, start, start + chunk + 1) > keys
    assert chunk_within(plan, start, tokens, math.inf) == tokens


def test_the_cost_of_a_dense_chunk_grows_with_its_position_and_that_of_a_star_chunk_does_not():
    budget = 64 * 1000
    star = [chunk_within(PLAN, start, 256, budget) for start in (1024, 4096, 7168)]
    dense = [chunk_within(None, start, 256, budget) for start in (1024, 4096, 7168)]
    assert star[0] == star[1] == star[2]
    assert dense[0] > 3 * dense[2]


prompts_drawn = st.lists(
    st.builds(
        LongPrompt,
        name=st.uuids().map(str),
        start=st.integers(0, 5000),
        left=st.integers(257, 9000),
        runs=st.booleans(),
        plan=st.none(),
        priority=st.integers(0, 1),
    ),
    min_size=1,
    max_size=5,
).map(lambda prompts: sorted(prompts, key=lambda prompt: prompt.priority))


@given(prompts=prompts_drawn, others=st.integers(0, 600))
def test_a_step_is_divided_within_its_limits(prompts, others):
    granted = divide_step(prompts, others, LIMITS)
    head, total = prompts[0], sum(granted.values())
    first = next((prompt for prompt in prompts if prompt.runs), head)
    assert total <= 256 - min(others, 128)
    assert granted[first.name] >= LIMITS.min_chunk, "the first running prompt gets a chunk in each step"
    assert all(granted.get(prompt.name, 0) <= prompt.left for prompt in prompts)
    quick = min((p for p in prompts if p.priority == head.priority), key=lambda p: p.left)
    if others:
        assert total <= LIMITS.shared_tokens
        keys = sum(attended(None, p.start, p.start + granted.get(p.name, 0)) for p in prompts)
        floor = attended(None, first.start, first.start + LIMITS.min_chunk)
        assert keys <= LIMITS.shared_keys + floor
    elif quick is head and first is head:
        assert granted == {head.name: 256}
    else:
        assert min(granted[head.name], granted[quick.name]) >= 128 - LIMITS.min_chunk


def test_limits_follow_the_defaults_and_the_options():
    assert make_limits(SchedulingOptions(), 8192) == Limits(8192, 8192, 2048, 2048 * 49152)
    given_all = SchedulingOptions(long_prompt_tokens=1000, shared_step_tokens=9000, shared_step_keys=5)
    assert make_limits(given_all, 8192) == Limits(8192, 1000, 8192, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fairness": 2}, r"scheduler\.fairness=2 is refused: it must be on or off.*int"),
        ({"fair": "on"}, r"scheduler\.fair='on'.*no such scheduler option.*fairness, long_prompt_tokens"),
        ({"long_prompt_tokens": 0}, r"scheduler\.long_prompt_tokens=0.*a whole number from 1"),
        ({"shared_step_tokens": 1}, r"scheduler\.shared_step_tokens=1.*a whole number from 2"),
        ({"shared_step_keys": "many"}, r"scheduler\.shared_step_keys='many'.*a whole number"),
        ({"star_block_reuse": "auto"}, r"scheduler\.star_block_reuse='auto'.*on or off"),
    ],
)
def test_bad_options_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        parse_scheduling(values)


# Schedulers.


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_step_config(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("plan", [None, PLAN], ids=["dense", "star"])
def test_a_request_alone_takes_the_steps_that_vllm_gives_it(config, plan):
    steps = []
    for scheduler_type in (Scheduler, StarScheduler):
        engine = make_engine(config, scheduler_type)
        add_long(engine, 1, plan)
        engine.run()
        steps.append(engine.steps)
    assert steps[0] == steps[1]
    assert len(steps[0]) == math.ceil(LONG / STEP)


@pytest.mark.parametrize("plan", [None, PLAN], ids=["dense", "star"])
def test_a_short_prompt_does_not_wait_for_long_ones(config, plan):
    num_steps = {}
    for scheduler_type in (Scheduler, StarScheduler):
        engine = make_engine(config, scheduler_type)
        add_long(engine, 3, plan)
        engine.step()
        engine.add("short", None, 100)
        before = len(engine.steps)
        engine.run()
        num_steps[scheduler_type] = engine.first_token["short"] - before
    assert num_steps[StarScheduler] == 1
    assert num_steps[Scheduler] > 60


def test_long_prompts_run_one_after_the_other_and_a_shorter_one_ends_first(config):
    engine = make_engine(config)
    add_long(engine, 3)
    engine.run()
    ends = [engine.first_token[f"long{index}"] for index in range(3)]
    assert ends == [31, 62, 93]
    engine = make_engine(config)
    add_long(engine, 2)
    engine.add("shorter", None, random_ids(9, 1000), max_tokens=1)
    engine.run()
    assert engine.first_token["shorter"] <= 1000 / (STEP / 2) + 1
    assert max(engine.first_token.values()) <= math.ceil((2 * LONG + 1000) / STEP) + 1


def test_every_step_has_all_decodes_and_a_bounded_prefill(config):
    engine = make_engine(config)
    for index in range(12):
        engine.add(f"chat{index}", None, random_ids(index, 20), max_tokens=200)
    engine.step()
    add_long(engine, 2)
    before = len(engine.steps)
    while len(engine.first_token) < 14 and len(engine.steps) < before + 180:
        engine.step()
        now = engine.steps[-1]
        assert sum(name.startswith("chat") for name in now) == 12
        assert sum(tokens for name, tokens in now.items() if name.startswith("long")) <= STEP // 4


def test_long_prompts_leave_at_most_every_second_step_to_short_prompts(config):
    engine = make_engine(config)
    engine.add("chat", None, 20, max_tokens=100)
    engine.step()
    add_long(engine, 2)
    engine.step()
    for number in range(6):
        engine.add(f"short{number}", None, random_ids(100 + number, 30), max_tokens=1)
        engine.step()
        assert engine.steps[-1][f"short{number}"] == 30
    engine.step()
    longs = [sum(tokens for name, tokens in step.items() if name.startswith("long")) for step in engine.steps[1:]]
    assert longs == [64, 0, 64, 0, 64, 0, 64, 64]


def run_with_short_prompts(engine: Engine, steps: int, max_tokens: int) -> None:
    """Add a short prompt before each step, until the long prompts have ended."""
    for number in range(steps):
        if not any(name.startswith("long") for name in engine.scheduler.requests):
            return
        engine.add(f"short{number}", None, random_ids(1000 + number, 30), max_tokens=max_tokens)
        engine.step()
    raise AssertionError(f"long prompts have not ended after {steps} steps")


def test_a_waiting_long_prompt_is_admitted_under_a_stream_of_short_ones(config):
    engine = make_engine(config, num_pages=560)
    for number in range(40):
        engine.add(f"before{number}", None, random_ids(number, 30), max_tokens=60)
        engine.step()
    add_long(engine, 1)
    run_with_short_prompts(engine, 500, max_tokens=60)
    assert "long0" in engine.first_token


@pytest.mark.parametrize("interval", [1, 2, 3, 4])
def test_long_prompts_end_with_prefill_in_some_steps_only(config, interval):
    """As with vLLM's --prefill-schedule-interval."""
    engine = make_engine(config)
    engine.add("chat", None, 20, max_tokens=5000)
    add_long(engine, 2)
    engine.step()
    throttle(engine, interval)
    run_with_short_prompts(engine, 2 * interval * (2 * LONG // (STEP // 4) + 2), max_tokens=2)


def test_a_long_prompt_without_tokens_in_a_step_keeps_the_slot_of_its_adapter(config):
    made = copy.copy(config)
    made.lora_config = SimpleNamespace(max_loras=1)
    engine = make_engine(made)
    one, other = (LoRARequest(name, number, f"/{name}") for number, name in enumerate("ab", 1))
    engine.add("long", None, random_ids(0, LONG), max_tokens=1, lora_request=one)
    engine.step()
    engine.add("other", None, 30, lora_request=other)
    for number in range(3):
        engine.add(f"short{number}", None, random_ids(number, 30), lora_request=one if number else None)
        engine.step()
    engine.run()
    assert all(not {"long", "other"} <= step.keys() for step in engine.steps)
    assert max(engine.first_token[f"short{number}"] for number in range(3)) <= 5
    assert engine.first_token["long"] < engine.first_token["other"]
    assert len(engine.steps) <= LONG / STEP + 10  # the request without a slot delays no other


def test_the_limit_of_keys_bounds_late_dense_chunks_and_not_star_chunks(config):
    chunks = {}
    for plan in (None, PLAN):
        engine = make_engine(config, shared_step_keys=64 * 1000)
        engine.add("chat", None, 20, max_tokens=800)
        engine.step()
        add_long(engine, 1, plan)
        engine.run(900)
        chunks[plan] = [step["long0"] for step in engine.steps if "long0" in step]
    assert set(chunks[None][-20:-1]) == {LIMITS.min_chunk}
    assert min(chunks[PLAN][30:-20]) >= 48


def test_deferred_tokens_are_counted(config):
    engine = make_engine(config)
    before = scheduler_metrics().deferred_tokens._value.get()
    engine.add("chat", None, 20, max_tokens=10)
    engine.step()
    add_long(engine, 1)
    for _ in range(3):
        engine.step()
    # Beside a decode, a step has 255 tokens. The long prompt gets a quarter of a step, in each of its three steps.
    assert scheduler_metrics().deferred_tokens._value.get() - before == 3 * (255 - 64)


def test_with_fairness_off_steps_are_those_of_vllm(config):
    def run(engine: Engine) -> list[dict[str, int]]:
        add_long(engine, 2)
        engine.step()
        engine.add("short", None, 100)
        engine.run()
        return engine.steps

    off = make_engine(config, fairness="off")
    assert off.scheduler.part(PrefillLimiter) is None
    assert run(off) == run(make_engine(config, Scheduler))


def test_an_urgent_long_prompt_ends_before_less_urgent_requests(config):
    engine = make_engine(config, policy="priority")
    engine.add("later", None, random_ids(1, 2000), max_tokens=1, priority=5)
    engine.step()
    engine.add("urgent", None, random_ids(2, 2000), max_tokens=1, priority=0)
    engine.add("short, not urgent", None, random_ids(3, 200), max_tokens=1, priority=9)
    before = len(engine.steps)
    engine.run()
    assert engine.first_token["urgent"] - before == math.ceil(2000 / STEP)
    assert engine.first_token["urgent"] < engine.first_token["later"]
    assert engine.first_token["urgent"] <= engine.first_token["short, not urgent"]


def test_a_prompt_that_is_mostly_cached_is_not_long(config):
    engine = make_engine(config)
    ids = random_ids(0, LONG)
    engine.add("before", None, ids, max_tokens=1)
    engine.run()
    add_long(engine, 2, cache_salt="other")
    engine.step()
    before = len(engine.steps)
    engine.add("again", None, [*ids[:-20], *random_ids(5, 20)], max_tokens=1)
    engine.run()
    assert engine.first_token["again"] - before == 1


def test_a_long_prompt_without_room_waits_instead_of_being_preempted(config):
    engine = make_engine(config, num_pages=LONG // PAGE_SIZE + 300)
    engine.add("first", None, random_ids(1, LONG), max_tokens=1)
    engine.add("second", None, random_ids(2, 5000), max_tokens=1)
    engine.run()
    engine.check_pages()
    assert sum(request.num_preemptions for request in engine.scheduler.requests.values()) == 0
    assert engine.computed == {"first": LONG, "second": 5000}


arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # at which step
        st.sampled_from([5, 100, 255, 257, 700, 1500]),
        st.booleans(),  # star
        st.integers(0, 2),  # priority
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=40, deadline=None)
@given(arrivals=arrivals, policy=st.sampled_from(["fcfs", "priority"]), num_pages=st.sampled_from([110, 200, 3000]))
def test_every_request_ends_and_no_page_is_wrong(config, arrivals, policy, num_pages):
    """If the memory has room for all requests, the number of steps is bounded by their tokens."""
    engine = make_engine(config, num_pages=num_pages, policy=policy)
    scheduler = engine.scheduler
    step = 0
    for number, (when, length, star, priority) in enumerate(sorted(arrivals)):
        while step < when:
            engine.step()
            step += 1
        plan = StarPlan(128, 64, 0, length - 20, length) if star and length > 200 else None
        priority = priority if policy == "priority" else 0
        engine.add(f"r{number}", plan, random_ids(number, length), max_tokens=4, priority=priority)
        queue = list(scheduler.waiting)
        assert len(queue) == len({request.request_id for request in queue})
    waiting = [request.request_id for request in scheduler.waiting]
    engine.run(400)
    engine.check_pages()
    assert len(engine.first_token) == len(arrivals), waiting
    if num_pages == 3000:
        total = sum(length + 4 for _, length, _, _ in arrivals)
        assert len(engine.steps) <= 12 + total / LIMITS.min_chunk + 8
    assert scheduler.reset_prefix_cache()


FULL = FullAttentionSpec(block_size=PAGE_SIZE, **SHAPE)
WINDOW = SlidingWindowSpec(block_size=PAGE_SIZE, sliding_window=4096, **SHAPE)
LOCAL = ChunkedLocalAttentionSpec(block_size=PAGE_SIZE, attention_chunk_size=4096, **SHAPE)


@pytest.mark.parametrize("second", [None, WINDOW, LOCAL], ids=["full", "full and window", "full and chunked local"])
@pytest.mark.parametrize(("scheduler_type", "left"), [(Scheduler, 3), (StarScheduler, 0)])
def test_a_chunk_preempted_in_its_own_step_leaves_no_page_keys(config, scheduler_type, left, second):
    """With vLLM alone a later prompt would hit pages that were never written, so StarMixin removes the keys."""
    specs = [FULL, second] if second else [FULL]
    sizes = {"num_pages": 1 + 25 * len(specs), "specs": specs}
    engine = make_engine(config, scheduler_type, **sizes, policy="priority", long_prefill_token_threshold=64)
    victim = engine.add("victim", None, random_ids(1, 390), priority=5)
    engine.step()
    engine.add("urgent", None, random_ids(2, 16), priority=0)
    engine.step()
    computed = victim.num_computed_tokens
    assert 256 < computed <= 320
    engine.scheduler.schedule()
    assert victim.num_preemptions == 1
    unwritten = victim.block_hashes[computed // PAGE_SIZE : (computed + 64) // PAGE_SIZE]
    counts = [
        sum(engine.pool.get_cached_block(key, [group]) is not None for key in unwritten) for group in range(len(specs))
    ]
    assert [count > 0 for count in counts] == [left > 0] * len(specs)
    assert second or counts == [left]


def test_without_chunked_prefill_there_is_no_limiter(config):
    made = copy.copy(config)
    made.scheduler_config = copy.copy(config.scheduler_config)
    made.scheduler_config.enable_chunked_prefill = False
    assert make_scheduler(made, StarScheduler, PAGE_SIZE).part(PrefillLimiter) is None
