"""Prefill progress in an HTTP event stream, over a simulated server."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from engine_ext.front.state import front_state
from engine_ext.serving.http.progress import HttpProgress
from scheduler.core_rpc import PREFILL_PROGRESS
from tests.unit.engine_ext.front.simulation import Server
from tests.unit.scheduler.simulation import random_ids

EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
PROMPT = random_ids(0, 2500)
DATA = [b"data: x\n\n"] * 3 + [b"data: [DONE]\n\n", b""]


async def respond(server: Server, headers, *, content=EVENT_STREAM, path="/v1/completions") -> list[bytes]:
    """Bodies that a client gets of an application that sends an event for each token."""
    bodies: list[bytes] = []

    async def app(scope, receive, send):
        outputs = server.stream(PROMPT)  # vLLM makes the generator before the response starts
        await send({"type": "http.response.start", "status": 200, "headers": content})
        async for _ in outputs:
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message):
        if message["type"] == "http.response.body":
            bodies.append(message["body"])

    scope = {"type": "http", "path": path, "headers": headers}
    scope["app"] = SimpleNamespace(state=SimpleNamespace(engine_client=server.engine))
    await HttpProgress(app)(scope, None, send)
    return bodies


def test_comments_come_before_the_first_event(simulate):
    async def scenario(server):
        bodies = await respond(server, [(b"x-starling-progress", b"true")])
        comments, events = bodies[: -len(DATA)], bodies[-len(DATA) :]
        assert events == DATA
        prefix, ending = b": starling-progress ", b"\n\n"
        assert all(line.startswith(prefix) and line.endswith(ending) and line.count(b"\n") == 2 for line in comments)
        updates = [json.loads(line.removeprefix(prefix)) for line in comments]
        computed = [update["computed"] for update in updates]
        assert len(computed) > 2
        assert computed == sorted(set(computed))
        numbers = {"prompt": 2500, "cached": 0, "context": 0, "star_blocks_done": 0, "star_blocks": 0}
        assert updates[0] == {"prompt_index": 0, "computed": computed[0]} | numbers
        assert not front_state(server.engine).poller.watches

    simulate(scenario)


@pytest.mark.parametrize(
    "request_",
    [
        {"headers": []},
        {"headers": [(b"x-starling-progress", b"false")]},
        {"headers": [(b"x-starling-progress", b"true")], "path": "/v1/responses"},
        {"headers": [(b"x-starling-progress", b"true")], "content": [(b"content-type", b"application/json")]},
    ],
    ids=["no header", "false", "another path", "not streamed"],
)
def test_other_responses_are_unchanged(simulate, request_):
    async def scenario(server):
        assert await respond(server, **request_) == DATA
        assert not server.calls(PREFILL_PROGRESS)

    simulate(scenario)
