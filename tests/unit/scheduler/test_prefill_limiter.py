"""The limiter of long prompts beside vLLM's own limits: each test compares it with vLLM's scheduler."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.request import RequestStatus

from starling.engine_ext.engine_core import StarScheduler
from starling.features.fairness.core import PrefillLimiter
from starling.vllm_compat.scheduler_view import SchedulerView
from tests.unit.scheduler.simulation import SHAPE, Engine, random_ids
from tests.unit.scheduler.steps import LONG, PAGE_SIZE, STEP, add_long, make_engine, make_step_config, throttle

ALONE = -(-LONG // STEP)  # steps of a long prompt that has them for itself


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_step_config(tmp_path_factory.mktemp("models"))


def with_one_adapter(config, scheduler_type, **scheduling) -> tuple[Engine, LoRARequest, LoRARequest]:
    made = copy.copy(config)
    made.lora_config = SimpleNamespace(max_loras=1)
    one, other = (LoRARequest(name, number, f"/{name}") for number, name in enumerate("ab", 1))
    return make_engine(made, scheduler_type, **scheduling), one, other


@pytest.mark.parametrize("scheduler_type", [Scheduler, StarScheduler])
@pytest.mark.parametrize("length", [LONG, 2000], ids=["as long", "shorter"])
@pytest.mark.parametrize("policy", ["priority", "fcfs"])
def test_a_long_prompt_whose_adapter_has_no_slot_takes_no_tokens(config, scheduler_type, length, policy):
    engine, one, other = with_one_adapter(config, scheduler_type, policy=policy)
    engine.add("runs", None, random_ids(0, LONG), max_tokens=1, lora_request=one, priority=5)
    engine.step()
    engine.add("waits", None, random_ids(1, length), max_tokens=1, lora_request=other)
    engine.run()
    assert engine.first_token["runs"] == ALONE
    assert engine.first_token["waits"] == ALONE + -(-length // STEP)


@pytest.mark.parametrize("scheduler_type", [Scheduler, StarScheduler])
@pytest.mark.parametrize("length", [LONG, 30], ids=["long", "short"])
def test_requests_beyond_max_num_active_seqs_take_no_tokens(config, scheduler_type, length):
    engine = make_engine(config, scheduler_type, max_num_active_seqs=1)
    add_long(engine, 1)
    engine.step()
    engine.add("waits", None, random_ids(1, length), max_tokens=1)
    engine.run()
    assert engine.first_token["long0"] == ALONE
    assert all(engine.steps)
    assert len(engine.steps) == ALONE + -(-length // STEP)


def test_sessions_that_wait_for_input_count_as_active(config):
    engine = make_engine(config, max_num_active_seqs=2)
    engine.scheduler.num_waiting_for_streaming_input = 1
    add_long(engine, 2)
    engine.step()
    engine.step()
    assert list(engine.steps[1]) == ["long0"]
    assert sum(engine.steps[1].values()) == STEP


FULL = FullAttentionSpec(block_size=PAGE_SIZE, **SHAPE)
WINDOW = SlidingWindowSpec(block_size=PAGE_SIZE, sliding_window=512, **SHAPE)


def test_the_pages_of_sliding_windows_are_counted_as_vllm_counts_them(config):
    """A model with five groups of sliding windows beside one of full attention: two prompts fit, counted by windows."""
    specs = [FULL, *[WINDOW] * 5]
    engine = make_engine(config, specs=specs, num_pages=2 * (LONG // PAGE_SIZE) + 2 * 5 * (768 // PAGE_SIZE + 4))
    add_long(engine, 1)
    engine.step()
    second = engine.add("second", None, random_ids(1, LONG // 2), max_tokens=1)
    engine.add("short", None, 100, max_tokens=1)
    for _ in range(4):
        engine.step()
    assert "short" in engine.first_token
    assert any("second" in step for step in engine.steps)
    engine.run()
    assert second.num_preemptions == 0


@pytest.mark.parametrize("local", [False, True], ids=["by the engine core", "by the scheduler"])
@pytest.mark.parametrize(("interval", "count"), [(2, 1), (4, 1), (8, 1), (8, 5)])
def test_steps_without_prefill_leave_their_share_to_the_next_one(config, interval, count, local):
    """vLLM 0.33 also has the interval in the scheduler of an engine without data-parallel replicas."""
    steps = {}
    for scheduler_type in (Scheduler, StarScheduler):
        engine = make_engine(config, scheduler_type, **({"prefill_schedule_interval": interval} if local else {}))
        if local and not hasattr(engine.scheduler, "local_prefill_interval"):
            pytest.skip("vLLM 0.32 has the interval with data-parallel replicas only")
        engine.add("chat", None, 20, max_tokens=5000)
        engine.step()
        if not local:
            throttle(engine, interval)
        names = set(add_long(engine, count))
        while names & engine.scheduler.requests.keys():
            assert engine.step()
        steps[scheduler_type] = len(engine.steps)
        assert all("chat" in step for step in engine.steps)
    # A quarter of each step, as without the option. With an interval of 4 or more and one prompt, the steps of vLLM.
    # With more, vLLM prefills in every step, and so does Starling.
    most = max(interval, 4) / interval if count == 1 else 4 / 2
    assert steps[StarScheduler] <= 1.1 * most * steps[Scheduler]


@pytest.mark.parametrize("seats", [2, 4])
def test_long_prompts_leave_a_seat_to_short_ones(config, seats):
    first_tokens = {}
    for scheduler_type in (Scheduler, StarScheduler):
        engine = make_engine(config, scheduler_type, max_num_active_seqs=seats)
        add_long(engine, 5)
        engine.step()
        engine.step()
        engine.add("short", None, 100, max_tokens=1)
        engine.run()
        first_tokens[scheduler_type] = engine.first_token
    assert first_tokens[StarScheduler]["short"] <= 4
    assert first_tokens[Scheduler]["short"] > 4 * ALONE
    assert max(first_tokens[StarScheduler].values()) <= max(first_tokens[Scheduler].values()) + 1


def test_an_urgent_long_prompt_takes_the_last_seat(config):
    engine = make_engine(config, policy="priority", max_num_active_seqs=2)
    add_long(engine, 1, priority=5)
    engine.step()
    engine.add("urgent", None, random_ids(1, 2000), max_tokens=1, priority=0)
    engine.run()
    assert engine.first_token["urgent"] <= 1 + 2000 // STEP + 2


def fill_with_chats(engine: Engine, count: int, max_tokens: int) -> None:
    for number in range(count):
        engine.add(f"chat{number}", None, random_ids(100 + number, 250), max_tokens=max_tokens)
        engine.step()


@pytest.mark.parametrize("scheduler_type", [Scheduler, StarScheduler])
def test_short_prompts_pass_a_long_one_that_does_not_fit(config, scheduler_type):
    """A long prompt of 494 pages waits until chats that hold some 240 of 600 have ended."""
    engine = make_engine(config, scheduler_type, num_pages=600)
    fill_with_chats(engine, 12, max_tokens=100)
    add_long(engine, 1)
    engine.step()
    before = len(engine.steps)
    engine.add("short", None, 100, max_tokens=1)
    engine.run()
    passes = engine.first_token["short"] <= before + 3
    assert passes == (scheduler_type is StarScheduler)
    assert passes == (engine.first_token["short"] < engine.first_token["long0"])
    engine.check_pages()


def test_the_tokens_of_short_prompts_that_pass_are_bounded(config):
    """Short prompts that each hold their pages for long, without an end: the long one is admitted nevertheless."""
    engine = make_engine(config, num_pages=600)
    fill_with_chats(engine, 12, max_tokens=100)
    long = engine.add("long", None, random_ids(0, LONG), max_tokens=1)
    engine.step()
    passed = 0
    for number in range(600):
        engine.add(f"short{number}", None, random_ids(200 + number, 100), max_tokens=40)
        engine.step()
        if long.status == RequestStatus.RUNNING:
            break
        passed += 100 * sum(name.startswith("short") and tokens == 100 for name, tokens in engine.steps[-1].items())
    assert long.status == RequestStatus.RUNNING
    assert 0 < passed <= LONG // 4 + STEP


def test_a_short_prompt_that_never_passes_does_not_use_up_the_tokens_for_passing(config):
    """It does not fit either, until pages become free."""
    engine = make_engine(config)
    engine.add("chat", None, 20, max_tokens=400)
    engine.step()
    others = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 12)
    long = engine.add("long", None, random_ids(0, LONG), max_tokens=1)
    engine.add("short", None, random_ids(1, 250), max_tokens=1)
    for _ in range(30):
        engine.step()
    assert "short" not in engine.first_token
    engine.pool.free_blocks(others[:50])
    for _ in range(4):
        engine.step()
    assert "short" in engine.first_token
    assert long.status != RequestStatus.RUNNING


def test_a_long_prompt_is_admitted_in_the_step_in_which_it_fits(config):
    engine = make_engine(config, num_pages=560)
    engine.add("chat", None, random_ids(100, 2200), max_tokens=400)
    engine.run_until(lambda: "chat" in engine.first_token)
    engine.add("long", None, random_ids(0, LONG), max_tokens=1)
    for _ in range(2):  # after one of two steps the long prompt may be passed in the next one
        engine.step()
        if engine.scheduler.part(PrefillLimiter).admission.head_without_room:
            break
    assert engine.scheduler.part(PrefillLimiter).admission.head_without_room == "long"
    engine.scheduler.finish_requests(["chat"], RequestStatus.FINISHED_ABORTED)
    engine.step()
    assert engine.steps[-1] == {"long": STEP}


def test_a_long_prompt_without_room_takes_no_adapter_slot(config):
    made = copy.copy(config)
    made.lora_config = SimpleNamespace(max_loras=2)
    one, two, three = (LoRARequest(name, number, f"/{name}") for number, name in enumerate("abc", 1))
    engine = make_engine(made, num_pages=LONG // PAGE_SIZE + 60)
    engine.add("runs", None, random_ids(0, LONG), max_tokens=1, lora_request=one)
    engine.step()
    engine.add("without room", None, random_ids(1, LONG), max_tokens=1, lora_request=two)
    engine.add("short", None, random_ids(2, 100), max_tokens=1, lora_request=three)
    engine.run()
    assert engine.first_token["short"] <= 4
    assert engine.first_token["runs"] <= ALONE + 2


def test_a_request_whose_grammar_is_ready_takes_no_slot_of_a_long_prompt_without_tokens(config):
    """In vLLM 0.32 the adapters of a step count, not those of all running requests, and its engine would end."""
    engine, one, other = with_one_adapter(config, StarScheduler)
    engine.add("long", None, random_ids(0, LONG), max_tokens=1, lora_request=one)
    engine.step()
    grammar = engine.add("grammar", None, 30, max_tokens=1, lora_request=other)
    grammar.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    grammar.structured_output_request = SimpleNamespace(grammar=SimpleNamespace(), reasoning_ended=True)
    engine.add("short", None, 30, max_tokens=1)
    engine.step()
    assert engine.steps[-1].keys() == {"long", "short"}
    grammar.structured_output_request = None
    engine.run()
    assert engine.first_token["grammar"] > engine.first_token["long"]


def test_nothing_is_kept_of_a_long_prompt_that_was_passed_and_aborted(config):
    engine = make_engine(config)
    engine.add("chat", None, 20, max_tokens=40)
    engine.step()
    others = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 40)
    engine.add("long", None, random_ids(0, LONG), max_tokens=1)
    admission = engine.scheduler.part(PrefillLimiter).admission
    engine.run_until(lambda: admission.head_without_room == "long")
    engine.add("short", None, 100, max_tokens=1)
    engine.step()
    assert admission.tokens_before == {"long": 100}
    engine.scheduler.finish_requests(["long"], RequestStatus.FINISHED_ABORTED)
    engine.add("next", None, 100, max_tokens=1)
    engine.run()
    assert (admission.tokens_before, admission.passed) == ({}, None)
    engine.pool.free_blocks(others)


def test_a_waiting_session_is_as_long_as_what_it_has_not_computed(config):
    engine = make_engine(config)
    (name,) = add_long(engine, 1)
    request = engine.scheduler.requests[name]
    request.num_computed_tokens = LONG - 40  # as one that holds its pages while it waits for more input
    assert engine.scheduler.part(PrefillLimiter)._left(request) == 40


def test_a_queue_without_room_is_not_counted_to_its_end(config, monkeypatch):
    engine = make_engine(config)
    add_long(engine, 1)
    engine.step()
    engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 12)
    for number in range(300):
        engine.add(f"waits{number}", None, random_ids(number, 250), max_tokens=1)
    counted, count = [], SchedulerView.num_pages_of
    monkeypatch.setattr(SchedulerView, "num_pages_of", lambda *args: counted.append(1) or count(*args))
    engine.step()
    assert len(counted) < 10


@pytest.mark.parametrize("block", [64, 96, 544])
def test_chunks_end_where_the_state_of_mamba_layers_is_kept(config, block):
    """mamba_cache_mode=align; a block of 544 tokens is wider than a step."""
    full = FullAttentionSpec(block_size=block, **SHAPE)
    mamba = MambaSpec(block_size=block, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode="align")
    made = copy.copy(config)
    made.cache_config = copy.copy(config.cache_config)
    made.cache_config.block_size, made.cache_config.mamba_cache_mode = block, "align"
    num_steps = {}
    for scheduler_type in (Scheduler, StarScheduler):
        engine = make_engine(made, scheduler_type, specs=[full, mamba], page_size=block)
        engine.add("chat", None, 20, max_tokens=2000)
        engine.step()
        add_long(engine, 3)
        engine.step()
        engine.add("short", None, 100, max_tokens=1)
        before, position = len(engine.steps), engine.steps[-1]["long0"]
        while len(engine.first_token) < 5:
            engine.step()
            position += engine.steps[-1].get("long0", 0)
            # A block wider than a step is computed in several, the last of which ends with it.
            assert block > STEP or position % block == 0 or position >= LONG
            assert "chat" in engine.steps[-1]
        num_steps[scheduler_type] = (engine.first_token["short"] - before, len(engine.steps))
    assert num_steps[StarScheduler][0] <= 2 < num_steps[Scheduler][0]
