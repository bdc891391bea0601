"""How prompts share steps: the arithmetic alone, and a scheduler without a model against vLLM's own."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.scheduler import Scheduler

from scheduler.fairness import Limits, LongPrompt, attended, chunk_within, make_limits, share_step
from scheduler.options import OptionError
from scheduler.plan import StarPlan
from scheduler.scheduling_options import SchedulingOptions, parse_scheduling
from scheduler.star_scheduler import StarScheduler
from tests.unit.simulation import Engine, make_config, make_scheduler, random_ids

STEP, PAGE, LONG = 256, 16, 7900
LIMITS = Limits(step_tokens=256, long_prompt=256, shared_tokens=64, shared_keys=64 * 1000)
PLAN = StarPlan(512, 512, 0, LONG - 32, LONG)


# The arithmetic.


@given(
    start=st.integers(0, 900),
    tokens=st.integers(1, 400),
    keys=st.integers(0, 300_000),
    star=st.booleans(),
)
def test_a_chunk_is_the_longest_within_its_keys(start, tokens, keys, star):
    plan = StarPlan(128, 64, 0, 1200, 1400) if star else None
    chunk = chunk_within(plan, start, tokens, keys)
    assert 0 <= chunk <= tokens
    assert attended(plan, start, start + chunk) <= keys
    assert chunk == tokens or attended(plan, start, start + chunk + 1) > keys
    assert chunk_within(plan, start, tokens, math.inf) == tokens


def test_a_star_chunk_costs_the_same_anywhere_and_a_dense_one_does_not():
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
def test_a_step_is_shared(prompts, others):
    granted = share_step(prompts, others, LIMITS)
    head, total = prompts[0], sum(granted.values())
    first = next((prompt for prompt in prompts if prompt.runs), head)
    assert total <= 256 - min(others, 128)
    assert granted[first.name] >= LIMITS.least_chunk, "the first that runs never stops"
    assert all(granted.get(prompt.name, 0) <= prompt.left for prompt in prompts)
    quick = min((p for p in prompts if p.priority == head.priority), key=lambda p: p.left)
    if others:
        assert total <= LIMITS.shared_tokens
        keys = sum(attended(None, p.start, p.start + granted.get(p.name, 0)) for p in prompts)
        floor = attended(None, first.start, first.start + LIMITS.least_chunk)
        assert keys <= LIMITS.shared_keys + floor
    elif quick is head and first is head:
        assert granted == {head.name: 256}
    else:
        assert min(granted[head.name], granted[quick.name]) >= 128 - LIMITS.least_chunk


def test_limits_by_default_and_as_given():
    assert make_limits(SchedulingOptions(), 8192) == Limits(8192, 8192, 2048, 2048 * 49152)
    given_all = SchedulingOptions(long_prompt_tokens=1000, shared_step_tokens=9000, shared_step_keys=5)
    assert make_limits(given_all, 8192) == Limits(8192, 1000, 8192, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fairness": True}, r"scheduler\.fairness=True is refused: it must be on or off.*bool"),
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
    arguments = {"max_num_batched_tokens": STEP, "max_num_seqs": 32, "block_size": PAGE, "max_model_len": 8192}
    return make_config(tmp_path_factory.mktemp("models"), **arguments)


def make_engine(config, scheduler_type=StarScheduler, pages: int = 3000, **scheduling) -> Engine:
    made = copy.copy(config)
    made.scheduler_config = copy.copy(config.scheduler_config)
    made.additional_config = {"starling": {"scheduler": scheduling}}
    for name in ("policy", "long_prefill_token_threshold"):
        if name in scheduling:
            setattr(made.scheduler_config, name, scheduling.pop(name))
    return Engine(make_scheduler(made, scheduler_type, PAGE, pages), page=PAGE)


def add_long(engine: Engine, count: int, plan: StarPlan | None = None, **more) -> list[str]:
    names = [f"long{index}" for index in range(count)]
    for index, name in enumerate(names):
        engine.add(name, plan, random_ids(index, LONG), max_tokens=1, **more)
    return names


@pytest.mark.parametrize("plan", [None, PLAN], ids=["dense", "star"])
def test_a_lone_request_takes_the_steps_it_always_took(config, plan):
    steps = []
    for scheduler_type in (Scheduler, StarScheduler):
        engine = make_engine(config, scheduler_type)
        add_long(engine, 1, plan)
        engine.run()
        steps.append(engine.steps)
    assert steps[0] == steps[1]
    assert len(steps[0]) == math.ceil(LONG / STEP)


@pytest.mark.parametrize("plan", [None, PLAN], ids=["dense", "star"])
def test_a_short_prompt_is_not_behind_long_ones(config, plan):
    took = {}
    for scheduler_type in (Scheduler, StarScheduler):
        engine = make_engine(config, scheduler_type)
        add_long(engine, 3, plan)
        engine.step()
        engine.add("short", None, 100)
        before = len(engine.steps)
        engine.run()
        took[scheduler_type] = engine.first_token["short"] - before
    assert took[StarScheduler] == 1
    assert took[Scheduler] > 60


def test_long_prompts_end_as_early_as_one_after_the_other_and_a_shorter_one_overtakes(config):
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


def test_decodes_go_on_in_every_step_and_its_prefill_is_bounded(config):
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


def test_long_prompts_leave_a_step_to_short_ones_but_never_two_running(config):
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


def with_a_stream(engine: Engine, steps: int, max_tokens: int) -> None:
    """Step, with a short prompt coming before each, until the long ones are done."""
    for number in range(steps):
        if not any(name.startswith("long") for name in engine.scheduler.requests):
            return
        engine.add(f"short{number}", None, random_ids(1000 + number, 30), max_tokens=max_tokens)
        engine.step()
    raise AssertionError(f"long prompts not done after {steps} steps")


def test_a_waiting_long_prompt_gets_its_memory_under_a_stream_of_short_ones(config):
    engine = make_engine(config, pages=560)
    for number in range(40):
        engine.add(f"before{number}", None, random_ids(number, 30), max_tokens=60)
        engine.step()
    add_long(engine, 1)
    with_a_stream(engine, 500, max_tokens=60)
    assert "long0" in engine.first_token


@pytest.mark.parametrize("interval", [1, 2, 3, 4])
def test_long_prompts_go_on_where_prefill_runs_in_some_steps_only(config, interval):
    """vLLM's --prefill-schedule-interval."""
    engine = make_engine(config)
    engine.add("chat", None, 20, max_tokens=5000)
    add_long(engine, 2)
    engine.step()
    schedule, steps = engine.scheduler.schedule, itertools.count(1)
    engine.scheduler.schedule = lambda: schedule(throttle_prefills=next(steps) % interval != 0)
    with_a_stream(engine, 2 * interval * (2 * LONG // (STEP // 4) + 2), max_tokens=2)


def test_a_long_prompt_that_has_no_part_in_a_step_keeps_its_adapters_place(config):
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
    assert len(engine.steps) <= LONG / STEP + 10  # the one that can't run holds nobody back


def test_attended_keys_bound_dense_chunks_at_depth_and_not_star_ones(config):
    chunks = {}
    for plan in (None, PLAN):
        engine = make_engine(config, shared_step_keys=64 * 1000)
        engine.add("chat", None, 20, max_tokens=800)
        engine.step()
        add_long(engine, 1, plan)
        engine.run(900)
        chunks[plan] = [step["long0"] for step in engine.steps if "long0" in step]
    assert set(chunks[None][-20:-1]) == {LIMITS.least_chunk}
    assert min(chunks[PLAN][30:-20]) >= 48


def test_what_is_held_back_is_counted(config):
    engine = make_engine(config)
    before = engine.scheduler.metrics.deferred_tokens._value.get()
    engine.add("chat", None, 20, max_tokens=10)
    engine.step()
    add_long(engine, 1)
    for _ in range(3):
        engine.step()
    # Of 255 tokens left beside a decode, a quarter step was granted; on admission as in the two steps after.
    assert engine.scheduler.metrics.deferred_tokens._value.get() - before == 3 * (255 - 64)


def test_off_it_schedules_as_vllm_does(config):
    def run(engine: Engine) -> list[dict[str, int]]:
        add_long(engine, 2)
        engine.step()
        engine.add("short", None, 100)
        engine.run()
        return engine.steps

    off = make_engine(config, fairness="off")
    assert off.scheduler.sharing is None
    assert run(off) == run(make_engine(config, Scheduler))


def test_priorities_are_respected(config):
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


def test_one_that_has_no_room_waits_instead_of_being_preempted(config):
    engine = make_engine(config, pages=LONG // PAGE + 300)
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
@given(arrivals=arrivals, policy=st.sampled_from(["fcfs", "priority"]), pages=st.sampled_from([110, 200, 3000]))
def test_nobody_starves_and_no_page_is_wrong(config, arrivals, policy, pages):
    """Each ends, with right pages; with room for all, within the steps that its tokens and the others' can fill."""
    engine = make_engine(config, pages=pages, policy=policy)
    scheduler = engine.scheduler
    at = 0
    for number, (when, length, star, priority) in enumerate(sorted(arrivals)):
        while at < when:
            engine.step()
            at += 1
        plan = StarPlan(128, 64, 0, length - 20, length) if star and length > 200 else None
        priority = priority if policy == "priority" else 0
        engine.add(f"r{number}", plan, random_ids(number, length), max_tokens=4, priority=priority)
        queue = list(scheduler.waiting)
        assert len(queue) == len({request.request_id for request in queue})
    waiting = [request.request_id for request in scheduler.waiting]
    engine.run(400)
    engine.check_pages()
    assert len(engine.first_token) == len(arrivals), waiting
    if pages == 3000:
        total = sum(length + 4 for _, length, _, _ in arrivals)
        assert len(engine.steps) <= 12 + total / LIMITS.least_chunk + 8
    assert scheduler.reset_prefix_cache()


@pytest.mark.parametrize(("scheduler_type", "left"), [(Scheduler, 3), (StarScheduler, 0)])
def test_a_chunk_preempted_in_its_own_step_leaves_no_keys(config, scheduler_type, left):
    """vLLM leaves them, which is why StarMixin drops them: a later prompt would read pages that were never written."""
    engine = make_engine(config, scheduler_type, pages=26, policy="priority", long_prefill_token_threshold=64)
    victim = engine.add("victim", None, random_ids(1, 390), priority=5)
    engine.step()
    engine.add("urgent", None, random_ids(2, 16), priority=0)
    engine.step()
    computed = victim.num_computed_tokens
    assert 256 < computed <= 320
    engine.scheduler.schedule()
    assert victim.num_preemptions == 1
    unwritten = victim.block_hashes[computed // PAGE : (computed + 64) // PAGE]
    assert sum(engine.pool.get_cached_block(key, [0]) is not None for key in unwritten) == left


def test_where_chunks_cannot_be_cut_nobody_is_held_back(config):
    made = copy.copy(config)
    made.scheduler_config = copy.copy(config.scheduler_config)
    made.scheduler_config.enable_chunked_prefill = False
    assert make_scheduler(made, StarScheduler, PAGE).sharing is None
