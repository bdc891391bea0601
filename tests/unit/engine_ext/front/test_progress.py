"""The poller of prefill progress over a fake engine; test_split_prefill.py has it over simulated replicas."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from starling.engine_ext.front.call import Call, current_call, note_engine_request
from starling.engine_ext.front.progress import ARRIVAL_SECONDS, Progress, ProgressPoller, furthest
from starling.scheduler.cache_state import PREFILL_PROGRESS
from tests.unit.engine_ext.front.virtual_time import now, run

INTERVAL = 0.1


class FakeEngine:
    """Each call of the utility adds ``chunk`` tokens to every prompt of 100 that it asks for."""

    def __init__(self, chunk: int = 40) -> None:
        self.chunk = chunk
        self.calls: list[list[str]] = []
        self.computed: dict[str, int] = {}
        self.num_calls_of_other = 0
        self.errored = False
        self.dead_error = EngineDeadError()
        self.engine_core = SimpleNamespace(_call_utility_async=self.call, core_engines=["one", "other"])
        self.other_answers = asyncio.Event()
        self.other_answers.set()
        self.output_processor = SimpleNamespace(external_req_ids={}, request_states={})

    def add(self, name: str, choices: int = 1) -> None:
        ids = [f"{index}_{name}" for index in range(choices)]
        self.output_processor.external_req_ids[name] = ids
        for engine_id in ids:
            self.output_processor.request_states[engine_id] = SimpleNamespace(is_prefilling=True)
            self.computed[engine_id] = 0

    def first_token(self, name: str) -> None:
        for engine_id in self.output_processor.external_req_ids[name]:
            self.output_processor.request_states[engine_id].is_prefilling = False

    def remove(self, name: str) -> None:
        for engine_id in self.output_processor.external_req_ids.pop(name):
            del self.output_processor.request_states[engine_id]

    async def call(self, name: str, wanted: list[str], *, engine: str) -> dict:
        """Of two replicas, one knows all requests."""
        assert name == PREFILL_PROGRESS
        if engine == "other":
            self.num_calls_of_other += 1
            await self.other_answers.wait()
            return {}
        self.calls.append(wanted)
        for engine_id in wanted:
            self.computed[engine_id] += self.chunk
        return {engine_id: self.state(engine_id) for engine_id in wanted}

    def state(self, engine_id: str) -> dict[str, int]:
        computed = min(self.computed[engine_id], 100)
        numbers = {"prompt": 100, "cached": 0, "context": 80, "star_blocks": 4}
        return numbers | {"computed": computed, "star_blocks_done": min(computed, 80) // 20}


async def read(poller: ProgressPoller, engine: FakeEngine, name: str) -> list[tuple[int, int]]:
    updates = poller.watch(engine, name, INTERVAL)
    return [(progress.computed, progress.star_blocks_done) async for progress in updates]


def test_a_client_sees_its_own_request_of_an_id_that_others_have_chosen_too():
    """And none before its own has reached the engine."""

    async def scenario():
        engine, poller = FakeEngine(), ProgressPoller(tuple)
        engine.add("a", choices=2)  # of two clients: vLLM keeps them under the id that both have chosen
        engine.add("a1")
        token = current_call.set(call := Call())
        try:
            reader = asyncio.create_task(read(poller, engine, "a"))
        finally:
            current_call.reset(token)
        await asyncio.sleep(4 * INTERVAL)
        assert engine.calls == []
        call.engine_ids.add("1_a")
        assert await reader == [(40, 2), (80, 4), (100, 4)]
        assert engine.calls == [["1_a"]] * 3

    run(scenario)


def test_a_request_of_the_engine_belongs_to_the_call_that_made_it():
    call = Call()
    token = current_call.set(call)
    try:
        note_engine_request(SimpleNamespace(request_id="a-1f2e"))
    finally:
        current_call.reset(token)
    note_engine_request(SimpleNamespace(request_id="a-3d4c"))
    assert call.engine_ids == {"a-1f2e"}


def test_updates_come_until_the_prompt_is_done():
    async def scenario():
        engine = FakeEngine()
        engine.add("a")
        assert await read(ProgressPoller(tuple), engine, "a") == [(40, 2), (80, 4), (100, 4)]
        assert len(engine.calls) == 3

    run(scenario)


def test_one_call_serves_all_watchers():
    async def scenario():
        engine, poller = FakeEngine(), ProgressPoller(tuple)
        for name in ("a", "b", "c"):
            engine.add(name)
        updates = await asyncio.gather(*(read(poller, engine, name) for name in ("a", "b", "c", "a")))
        assert updates == [[(40, 2), (80, 4), (100, 4)]] * 4
        assert engine.calls == [["0_a", "0_b", "0_c"]] * 3

    run(scenario)


def test_a_replica_that_hangs_holds_up_no_other_ones_progress_and_is_asked_once():
    async def scenario():
        engine = FakeEngine()
        engine.add("a")
        engine.other_answers.clear()
        assert await read(ProgressPoller(tuple), engine, "a") == [(40, 2), (80, 4), (100, 4)]
        assert now() <= 5 * INTERVAL + 0.01, "one poll waits for the replica, for an interval"
        assert engine.num_calls_of_other == 1

    run(scenario)


def test_only_changes_are_reported():
    async def scenario():
        engine = FakeEngine(chunk=0)
        engine.add("a")
        reader = asyncio.create_task(read(ProgressPoller(tuple), engine, "a"))
        await asyncio.sleep(5.5 * INTERVAL)
        assert len(engine.calls) == 5
        engine.chunk = 100
        assert await reader == [(0, 0), (100, 4)]

    run(scenario)


def test_nothing_is_polled_where_nobody_watches_or_nothing_runs():
    async def scenario():
        engine, poller = FakeEngine(chunk=1), ProgressPoller(tuple)
        engine.add("a")
        async with aclosing(poller.watch(engine, "a", INTERVAL)) as updates:
            assert (await anext(updates)).computed == 1
        await asyncio.sleep(5 * INTERVAL)
        assert poller.task is None
        assert len(engine.calls) == 1
        # A request that has not arrived yet costs no call, and is waited for.
        reader = asyncio.create_task(read(poller, engine, "b"))
        await asyncio.sleep(5 * INTERVAL)
        assert len(engine.calls) == 1
        engine.chunk = 100
        engine.add("b")
        assert await reader == [(100, 4)]

    run(scenario)


@pytest.mark.parametrize(
    ("end", "updates"), [("first_token", [(1, 0), (100, 4)]), ("remove", [(1, 0)]), ("die", [(1, 0)])]
)
def test_a_watch_ends(end, updates):
    """The first token comes between two polls; the request is aborted; the engine dies."""

    async def scenario():
        engine, poller = FakeEngine(chunk=1), ProgressPoller(tuple)
        engine.add("a")
        found = []
        async for progress in poller.watch(engine, "a", INTERVAL):
            found.append((progress.computed, progress.star_blocks_done))
            if len(found) == 1:
                engine.errored = end == "die"
                if end != "die":
                    getattr(engine, end)("a")
        assert found == updates
        assert poller.watches == set()

    run(scenario)


def test_a_request_that_never_arrives():
    async def scenario():
        engine = FakeEngine()
        assert await read(ProgressPoller(tuple), engine, "a") == []
        assert ARRIVAL_SECONDS < now() < ARRIVAL_SECONDS + 2 * INTERVAL
        assert engine.calls == []

    run(scenario)


def test_the_choice_with_the_most_computed_tokens_counts():
    async def scenario():
        engine = FakeEngine()
        engine.add("a", choices=2)
        engine.computed["1_a"] = 50
        assert await read(ProgressPoller(tuple), engine, "a") == [(90, 4), (100, 4)]

    run(scenario)


def test_parts_of_a_prompt_count_together_until_the_whole_request_runs():
    whole = {"computed": 0, "prompt": 500, "cached": 0, "context": 450, "star_blocks_done": 0, "star_blocks": 5}
    one = whole | {"computed": 150, "cached": 64, "star_blocks_done": 1, "part": 1}
    two = whole | {"computed": 200, "star_blocks_done": 2, "part": 1}
    assert furthest([one, two]) == Progress(350, 500, 64, 450, 3, 5)
    assert furthest([whole | {"computed": 450, "part": 0}, two]) == Progress(450, 500, 0, 450, 0, 5)
    assert furthest([]) is None


def test_between_its_parts_and_the_whole_request_a_split_prompt_is_still_watched():
    async def scenario():
        engine, poller = FakeEngine(), ProgressPoller(lambda: {"a"})
        engine.add("a")
        found = []
        async for progress in poller.watch(engine, "a", INTERVAL):
            found.append(progress.computed)
            if len(found) == 1:
                engine.remove("a")
                engine.chunk = 0
                await asyncio.sleep(5 * INTERVAL)
                engine.add("a")
                engine.chunk = 40
        assert found == [40, 80, 100]

    run(scenario)


def test_progress_does_not_go_back_when_a_prompt_is_preempted():
    async def scenario():
        engine = FakeEngine()
        engine.add("a")
        found = []
        async for progress in ProgressPoller(tuple).watch(engine, "a", INTERVAL):
            found.append(progress.computed)
            if len(found) == 2:
                engine.computed["0_a"] = 0
        assert found == [40, 80, 100]

    run(scenario)
