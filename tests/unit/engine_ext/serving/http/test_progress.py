"""Prefill progress in an HTTP event stream, over a simulated server."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.serving.http.middleware import HttpProgress, NoteClient
from starling.scheduler.cache_state import PREFILL_PROGRESS
from tests.unit.engine_ext.front.simulation import Server
from tests.unit.scheduler.simulation import random_ids

EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
PROMPT = random_ids(0, 2500)
WANTED = [(b"x-starling-progress", b"true")]
DATA = [b"data: x\n\n"] * 3 + [b"data: [DONE]\n\n", b""]


async def respond(
    server: Server, headers, *, content=EVENT_STREAM, path="/v1/completions", show_cached: bool = True
) -> list[bytes]:
    """Bodies that a client gets of an application that sends an event for each token.

    Args:
        show_cached: vLLM's --enable-prompt-tokens-details.
    """
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
    args = SimpleNamespace(enable_prompt_tokens_details=show_cached)
    scope["app"] = SimpleNamespace(state=SimpleNamespace(engine_client=server.engine, args=args))
    await NoteClient(HttpProgress(app))(scope, None, send)
    return bodies


def progress_of(bodies: list[bytes]) -> list[dict]:
    """The progress in the comments before the events."""
    prefix, ending = b": starling-progress ", b"\n\n"
    comments, events = bodies[: -len(DATA)], bodies[-len(DATA) :]
    assert events == DATA
    assert all(line.startswith(prefix) and line.endswith(ending) and line.count(b"\n") == 2 for line in comments)
    return [json.loads(line.removeprefix(prefix)) for line in comments]


def test_comments_come_before_the_first_event(simulate):
    async def scenario(server):
        updates = progress_of(await respond(server, WANTED))
        computed = [update["computed"] for update in updates]
        assert len(computed) > 2
        assert computed == sorted(set(computed))
        numbers = {"prompt": 2500, "cached": 0, "context": 0, "star_blocks_done": 0, "star_blocks": 0}
        assert updates[0] == {"prompt_index": 0, "computed": computed[0]} | numbers
        assert not front_state(server.engine).poller.watches

    simulate(scenario)


def test_without_vllms_option_progress_does_not_say_what_was_cached(simulate):
    async def scenario(server):
        updates = progress_of(await respond(server, WANTED, show_cached=False))
        assert updates[0]["computed"]
        assert not any("cached" in update for update in updates)

    simulate(scenario)


@pytest.mark.parametrize(
    "request_",
    [
        {"headers": []},
        {"headers": [(b"x-starling-progress", b"false")]},
        {"headers": WANTED, "path": "/v1/responses"},
        {"headers": WANTED, "content": [(b"content-type", b"application/json")]},
    ],
    ids=["no header", "false", "another path", "not streamed"],
)
def test_other_responses_are_unchanged(simulate, request_):
    async def scenario(server):
        assert await respond(server, **request_) == DATA
        assert not server.calls(PREFILL_PROGRESS)

    simulate(scenario)
