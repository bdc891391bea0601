"""The shared poller of prefill progress over a stand-in for the engine, and its way into an HTTP stream."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from engine_ext.requests import response_requests
from engine_ext.serving import progress as module
from engine_ext.serving.http_progress import HttpProgress
from engine_ext.serving.progress import Progress, furthest, poller_of, watch_prefill
from engine_ext.spreading import under_way

TICK = 0.01


class CountingDict(dict):
    """Counts how often it was looked into."""

    looks = 0

    def get(self, *args):
        self.looks += 1
        return super().get(*args)


class FakeEngine:
    """Each call of the utility adds ``chunk`` tokens to every prompt of 100 that the front knows."""

    def __init__(self, chunk: int = 40) -> None:
        self.chunk = chunk
        self.calls: list[list[str]] = []
        self.computed: dict[str, int] = {}
        self.errored = False
        self.dead_error = EngineDeadError()
        self.engine_core = SimpleNamespace(call_utility_all_async=self.call)
        self.output_processor = SimpleNamespace(external_req_ids=CountingDict(), request_states={})

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

    async def call(self, name: str, wanted: list[str]) -> list[dict]:
        self.calls.append(wanted)
        for engine_id in wanted:
            self.computed[engine_id] += self.chunk
        # Two engines: each knows its own requests only.
        return [{engine_id: self.state(engine_id) for engine_id in wanted}, {}]

    def state(self, engine_id: str) -> dict[str, int]:
        computed = min(self.computed[engine_id], 100)
        numbers = {"prompt": 100, "cached": 0, "context": 80, "star_blocks": 4}
        return numbers | {"computed": computed, "star_blocks_done": min(computed, 80) // 20}


async def read(engine, name: str) -> list[tuple[int, int]]:
    return [(told.computed, told.star_blocks_done) async for told in watch_prefill(engine, name, TICK)]


def run(scenario):
    async def bounded():
        async with asyncio.timeout(10):
            return await scenario()

    return asyncio.run(bounded())


def test_until_the_prompt_is_done():
    async def scenario():
        engine = FakeEngine()
        engine.add("a")
        return await read(engine, "a"), len(engine.calls)

    assert run(scenario) == ([(40, 2), (80, 4), (100, 4)], 3)


def test_one_call_for_all_watchers():
    async def scenario():
        engine = FakeEngine()
        for name in ("a", "b", "c"):
            engine.add(name)
        told = await asyncio.gather(*(read(engine, name) for name in ("a", "b", "c", "a")))
        return told, engine.calls

    told, calls = run(scenario)
    assert told == [[(40, 2), (80, 4), (100, 4)]] * 4
    assert calls == [["0_a", "0_b", "0_c"]] * 3


def test_only_changes_are_told():
    async def scenario():
        engine = FakeEngine(chunk=0)
        engine.add("a")
        reader = asyncio.create_task(read(engine, "a"))
        while len(engine.calls) < 5:
            await asyncio.sleep(TICK)
        engine.chunk = 100
        return await reader

    assert run(scenario) == [(0, 0), (100, 4)]


def test_no_polling_when_nobody_watches_or_nothing_runs():
    async def scenario():
        engine = FakeEngine(chunk=1)
        engine.add("a")
        async with aclosing(watch_prefill(engine, "a", TICK)) as states:
            assert (await anext(states)).computed == 1
        while poller_of(engine).task is not None:
            await asyncio.sleep(TICK)
        assert len(engine.calls) == 1
        # A request that has not come yet costs no call, and is waited for.
        reader = asyncio.create_task(read(engine, "b"))
        looks = engine.output_processor.external_req_ids.looks + 3
        while engine.output_processor.external_req_ids.looks < looks:
            await asyncio.sleep(TICK)
        assert len(engine.calls) == 1
        engine.chunk = 100
        engine.add("b")
        return await reader

    assert run(scenario) == [(100, 4)]


@pytest.mark.parametrize(
    ("end", "told"), [("first_token", [(1, 0), (100, 4)]), ("remove", [(1, 0)]), ("die", [(1, 0)])]
)
def test_ways_to_end(end, told):
    """The first token comes between two looks; the request is aborted; the engine dies."""

    async def scenario():
        engine = FakeEngine(chunk=1)
        engine.add("a")
        found = []
        async for state in watch_prefill(engine, "a", TICK):
            found.append((state.computed, state.star_blocks_done))
            if len(found) == 1:
                engine.errored = end == "die"
                if end != "die":
                    getattr(engine, end)("a")
        assert poller_of(engine).watches == set()
        return found

    assert run(scenario) == told


def test_a_request_that_never_comes(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 3 * TICK)
    engine = FakeEngine()
    assert run(lambda: read(engine, "a")) == []
    assert engine.calls == []


def test_the_furthest_choice_counts():
    async def scenario():
        engine = FakeEngine()
        engine.add("a", choices=2)
        engine.computed["1_a"] = 50
        return await read(engine, "a")

    assert run(scenario) == [(90, 4), (100, 4)]


def test_parts_of_a_prompt_count_together_until_it_is_one():
    whole = {"computed": 0, "prompt": 500, "cached": 0, "context": 450, "star_blocks_done": 0, "star_blocks": 5}
    one = whole | {"computed": 150, "cached": 64, "star_blocks_done": 1, "part": 1}
    two = whole | {"computed": 200, "star_blocks_done": 2, "part": 1}
    assert furthest([one, two]) == Progress(350, 500, 64, 450, 3, 5)
    assert furthest([whole | {"computed": 450, "part": 0}, two]) == Progress(450, 500, 0, 450, 0, 5)
    assert furthest([]) is None


def test_between_its_parts_and_the_whole_a_prompt_is_still_watched():
    async def scenario():
        engine = FakeEngine()
        under_way(engine).add("a")
        engine.add("a")
        found = []
        async for state in watch_prefill(engine, "a", TICK):
            found.append(state.computed)
            if len(found) == 1:
                engine.remove("a")
                engine.chunk = 0
                await asyncio.sleep(5 * TICK)
                engine.add("a")
                engine.chunk = 40
        return found

    assert run(scenario) == [40, 80, 100]


def test_a_preempted_prompt_does_not_go_back():
    async def scenario():
        engine = FakeEngine()
        engine.add("a")
        found = []
        async for state in watch_prefill(engine, "a", TICK):
            found.append(state.computed)
            if len(found) == 2:
                engine.computed["0_a"] = 0
        return found

    assert run(scenario) == [40, 80, 100]


EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


async def http(engine, headers, *, content=EVENT_STREAM, path="/v1/completions") -> list[bytes]:
    """Bodies that a client gets of an application that answers once every prompt is done."""
    first = asyncio.Event()
    bodies: list[bytes] = []

    async def app(scope, receive, send):
        made = response_requests.get()
        if made is not None:
            made.append("a")
        engine.add("a")
        await send({"type": "http.response.start", "status": 200, "headers": content})
        if made is not None and content is EVENT_STREAM:
            await first.wait()
        for body in (b"data: x\n\n", b"data: [DONE]\n\n"):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message):
        if message["type"] == "http.response.body":
            bodies.append(message["body"])
            if b'"computed": 80' in message["body"]:
                first.set()

    scope = {"type": "http", "path": path, "headers": headers}
    scope["app"] = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    await HttpProgress(app)(scope, None, send)
    return bodies


DATA = [b"data: x\n\n", b"data: [DONE]\n\n", b""]


def test_http_comments_before_the_first_event(monkeypatch):
    monkeypatch.setattr("engine_ext.serving.http_progress.watch_prefill", lambda *ids: watch_prefill(*ids, TICK))
    engine = FakeEngine()
    *comments, one, two, three = run(lambda: http(engine, [(b"x-starling-progress", b"true")]))
    assert [one, two, three] == DATA
    prefix, ending = b": starling-progress ", b"\n\n"
    assert all(line.startswith(prefix) and line.endswith(ending) and line.count(b"\n") == 2 for line in comments)
    told = [json.loads(line.removeprefix(prefix)) for line in comments]
    assert [state["computed"] for state in told] == [40, 80]
    assert told[0] == {"prompt_index": 0} | Progress(40, 100, 0, 80, 2, 4).__dict__
    assert poller_of(engine).watches == set()


@pytest.mark.parametrize(
    "request_",
    [
        {"headers": []},
        {"headers": [(b"x-starling-progress", b"false")]},
        {"headers": [(b"x-starling-progress", b"true")], "path": "/v1/responses"},
        {"headers": [(b"x-starling-progress", b"true")], "content": [(b"content-type", b"application/json")]},
    ],
    ids=["not asked", "asked not to", "another path", "not streamed"],
)
def test_http_else_unchanged(request_):
    engine = FakeEngine()
    assert run(lambda: http(engine, **request_)) == DATA
    assert engine.calls == []
