"""What the live page shows of a scheduler's requests, after each step, without a model."""

from __future__ import annotations

import msgspec
import pytest
from vllm.v1.request import RequestStatus

from starling.engine_ext.engine_core import AsyncStarScheduler, StarScheduler
from starling.features.live import core as live_requests
from starling.features.live.core import LISTED, MAX_ID, LiveRequests, shortened
from starling.scheduler.planning.plan import summary
from starling.scheduler.planning.request_metadata import PromptPart, RequestMetadata
from tests.unit.scheduler.simulation import make_request, make_scheduler
from tests.unit.scheduler.test_cache_state import step
from tests.unit.scheduler.test_star_scheduler import PLAN, config

__all__ = ["config"]


@pytest.fixture
def clock(monkeypatch):
    """Seconds of time.monotonic, to be set."""
    seconds = [1000.0]
    monkeypatch.setattr(live_requests.time, "monotonic", lambda: seconds[0])
    return seconds


def shown(state: dict, *names: str) -> tuple:
    return tuple(state.get(name) for name in names)


def test_a_star_request_from_its_arrival_to_its_end(config):
    scheduler = make_scheduler(config, StarScheduler)
    assert scheduler.part(LiveRequests).look() == {"running": 0, "waiting": 0, "requests": [], "ended": []}
    scheduler.add_request(make_request("star", PLAN))
    states = []
    for _ in range(5):
        (state,) = scheduler.part(LiveRequests).look()["requests"]
        states.append(shown(state, "status", "computed", "star_blocks_done", "generated"))
        step(scheduler)
    assert states == [
        ("waiting", 0, 0, 0),
        ("running", 100, 1, 0),
        ("running", 200, 3, 0),
        ("running", 300, 4, 1),
        ("running", 300, 4, 2),
    ]
    plan = summary(PLAN)
    assert state["attention"] == "star"
    assert all(state[name] == plan[name] for name in ("keys_attended", "dense_keys", "documents", "replicas", "shards"))
    assert shown(state, "prompt", "star_blocks", "max_tokens", "preemptions") == (300, 4, 3, 0)

    live = scheduler.part(LiveRequests).look()
    (ended,) = live["ended"]
    assert (live["running"], live["waiting"], live["requests"]) == (0, 0, [])
    assert shown(ended, "id", "computed", "generated", "finish_reason") == ("star", 300, 3, "length")


def test_a_dense_request_has_no_blocks(config):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_request("dense", None))
    (state,) = scheduler.part(LiveRequests).look()["requests"]
    assert shown(state, "attention", "star_blocks", "dense_keys") == ("dense", 0, None)


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_prefix_hits_are_known_until_the_end(config, max_tokens):
    """vLLM hands the number on with the first token, which may be the last."""
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_request("first", None))
    while scheduler.has_unfinished_requests():
        step(scheduler)
    scheduler.part(LiveRequests).look()
    scheduler.add_request(make_request("again", None, max_tokens=max_tokens))
    cached = []
    while scheduler.has_unfinished_requests():
        step(scheduler)
        cached += [state["cached"] for state in scheduler.part(LiveRequests).look()["requests"]]
    (ended,) = scheduler.part(LiveRequests).look()["ended"]
    assert [*cached, ended["cached"]] == [288] * max_tokens


def test_hits_from_before_the_first_look_are_not_known(config):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_request("long", None))
    while not scheduler.requests["long"].num_output_tokens:
        step(scheduler)
    (state,) = scheduler.part(LiveRequests).look()["requests"]
    assert state["cached"] is None


def test_nothing_is_noted_before_a_look_and_nothing_is_kept_after_the_last(config, clock):
    scheduler = make_scheduler(config, StarScheduler)

    def run(name: str) -> None:
        scheduler.add_request(make_request(name, None))
        while scheduler.has_unfinished_requests():
            step(scheduler)

    run("before")
    assert scheduler.part(LiveRequests).looked is None
    scheduler.part(LiveRequests).look()
    run("watched")
    assert [state["id"] for state in scheduler.part(LiveRequests).look()["ended"]] == ["watched"]
    clock[0] += live_requests.WATCH_SECONDS
    run("later")
    assert scheduler.part(LiveRequests).looked is None
    assert scheduler.part(LiveRequests).look()["ended"] == []


def test_ended_requests_are_few_and_leave_after_a_while(config, clock):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.part(LiveRequests).look()
    for number in range(live_requests.ENDED + 3):
        scheduler.add_request(make_request(f"{number}", None))
        scheduler.finish_requests(f"{number}", RequestStatus.FINISHED_ABORTED)
    ended = scheduler.part(LiveRequests).look()["ended"]
    assert [state["id"] for state in ended] == [f"{number}" for number in reversed(range(3, live_requests.ENDED + 3))]
    assert {state["finish_reason"] for state in ended} == {"abort"}
    clock[0] += live_requests.ENDED_SECONDS / 2
    assert scheduler.part(LiveRequests).look()["ended"][0]["ended_seconds"] == live_requests.ENDED_SECONDS / 2
    clock[0] += live_requests.ENDED_SECONDS
    assert scheduler.part(LiveRequests).look()["ended"] == []


def test_of_many_requests_the_first_are_listed_and_all_are_counted(config):
    scheduler = make_scheduler(config, StarScheduler)
    for number in range(LISTED + 20):
        scheduler.add_request(make_request(f"{number}", None))
    step(scheduler)
    live = scheduler.part(LiveRequests).look()
    assert (live["running"], live["waiting"]) == (1, LISTED + 19), "a step has room for one prompt"
    assert [state["id"] for state in live["requests"]] == [f"{number}" for number in range(LISTED)]
    assert [state["status"] for state in live["requests"][:2]] == ["running", "waiting"]


def test_a_preempted_request_is_shown_as_such(config):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_request("star", PLAN))
    scheduler.part(LiveRequests).look()
    step(scheduler)
    (request,) = scheduler.running
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    live = scheduler.part(LiveRequests).look()
    assert shown(live["requests"][0], "status", "computed", "preemptions") == ("preempted", 0, 1)
    assert live["ended"] == []


def test_the_part_of_a_prompt_does_not_end_the_prompt(config):
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.part(LiveRequests).look()
    metadata = RequestMetadata(part=PromptPart("name", 128, 64))
    scheduler.add_request(make_request("part", PLAN, 250, max_tokens=1, metadata=metadata))
    for _ in range(2):
        step(scheduler)
    (state,) = scheduler.part(LiveRequests).look()["requests"]
    assert shown(state, "part", "computed", "star_blocks_done") == (1, 200 - 128, 1), "the anchor is not cached"
    while scheduler.has_unfinished_requests():
        step(scheduler)
    assert scheduler.part(LiveRequests).look()["ended"] == []


def test_tokens_of_steps_in_flight_do_not_count(config):
    scheduler = make_scheduler(config, AsyncStarScheduler)
    scheduler.add_request(make_request("star", PLAN))
    scheduler.schedule()
    scheduler.schedule()
    assert scheduler.requests["star"].num_computed_tokens == 200
    assert scheduler.part(LiveRequests).look()["requests"][0]["computed"] == 0


def test_an_id_of_a_client_has_a_bounded_length(config):
    """And the answer is what msgpack has, without pickle."""
    scheduler = make_scheduler(config, StarScheduler)
    scheduler.add_request(make_request("x" * 100_000, PLAN))
    encoded = msgspec.msgpack.encode(scheduler.part(LiveRequests).look())
    assert len(encoded) < 1000
    assert msgspec.msgpack.decode(encoded)["requests"][0]["id"] == "x" * (MAX_ID - 1) + "…"
    assert shortened("x" * MAX_ID) == "x" * MAX_ID
