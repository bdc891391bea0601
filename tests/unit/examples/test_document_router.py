"""examples/document_router.py in front of servers that leave, hang, die, or answer something else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from examples import document_router
from examples.document_router import Router

FOUND = {"plan": {"prompt_tokens": 100}, "replicas": [{"cached_tokens": 10}]}
NAME = (b"x-name", "café".encode("latin-1"))


async def pieces(*texts: bytes | Exception):
    for text in texts:
        if isinstance(text, Exception):
            raise text
        yield text


def router_before(answer: Callable[[httpx.Request], Awaitable[httpx.Response]], found: Any = FOUND) -> Router:
    """A router whose two servers find the same in their caches, and answer prompts as ``answer`` does."""

    async def serve(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=found) if "/starling/" in request.url.path else await answer(request)

    router = Router(["http://one", "http://two"])
    router.client = httpx.AsyncClient(transport=httpx.MockTransport(serve))
    return router


async def forward(
    router: Router,
    gone: asyncio.Event | None = None,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    body: bytes = b"{}",
) -> tuple[Response, bytes]:
    """Send a prompt to a router; ``gone`` is set when the client leaves."""
    messages, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive() -> dict[str, Any]:
        if not messages:
            await (gone or asyncio.Event()).wait()
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    scope["server"] = ("router", 80)
    response = await asyncio.wait_for(router.forward(Request(scope, receive)), 60)
    await asyncio.wait_for(response(scope, receive, send), 60)
    return response, b"".join(sent)


def waiting(router: Router) -> list[int]:
    return [server.waiting for server in router.servers]


def test_a_client_that_leaves_ends_its_request():
    async def scenario():
        asked, ended, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def hang(_: httpx.Request) -> httpx.Response:
            asked.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            raise AssertionError

        router = router_before(hang)
        call = asyncio.ensure_future(forward(router, gone))
        await asked.wait()
        assert sum(waiting(router)) == 90
        gone.set()
        await call
        await asyncio.wait_for(ended.wait(), 60)
        return waiting(router)

    assert asyncio.run(scenario()) == [0, 0]


def test_headers_of_any_bytes_pass_and_those_of_the_connection_do_not():
    async def answer(request: httpx.Request) -> httpx.Response:
        names = {name for name, _ in request.headers.raw}
        assert NAME in request.headers.raw and not {b"te", b"x-hop"} & names
        return httpx.Response(200, headers=[NAME, (b"connection", b"x-hop"), (b"x-hop", b"1")], content=pieces(b"hi"))

    headers = (NAME, (b"te", b"trailers"), (b"connection", b"close, X-Hop"), (b"x-hop", b"1"))
    router = router_before(answer)
    response, body = asyncio.run(forward(router, headers=headers))
    assert (body, response.raw_headers, waiting(router)) == (b"hi", [NAME], [0, 0])


@pytest.mark.parametrize(
    "found",
    [[], 7, {"plan": None, "replicas": []}, {"plan": {"prompt_tokens": "x"}, "replicas": [{"cached_tokens": 1}]}],
)
def test_a_server_that_says_something_else_of_its_cache_gets_requests(found):
    async def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=pieces(b"hi"))

    assert asyncio.run(forward(router_before(answer, found)))[1] == b"hi"


def test_prompts_go_to_the_server_with_less_to_do_where_none_says_what_it_has():
    async def scenario():
        asked = []

        async def hang(request: httpx.Request) -> httpx.Response:
            asked.append(request.url.host)
            await asyncio.Event().wait()
            raise AssertionError

        router = router_before(hang, [])
        calls = []
        for number in (1, 2):
            calls.append(asyncio.ensure_future(forward(router, body=b"x" * 400)))
            while len(asked) < number:
                await asyncio.sleep(0)
        assert (asked, waiting(router)) == (["one", "two"], [100, 100])
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scenario())


def test_a_server_that_dies_while_it_refuses_costs_nothing():
    async def answer(request: httpx.Request) -> httpx.Response:
        dies = httpx.Response(503, content=pieces(b"n", httpx.ReadError("gone")))
        return dies if request.url.host == "one" else httpx.Response(200, content=pieces(b"hi"))

    router = router_before(answer)
    assert asyncio.run(forward(router))[1] == b"hi"
    assert waiting(router) == [0, 0]


def test_a_body_that_is_too_large_is_refused_before_any_server_is_asked(monkeypatch):
    monkeypatch.setattr(document_router, "MAX_BODY", 1)
    asked = []

    async def note(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200)

    response, body = asyncio.run(forward(router_before(note)))
    assert (response.status_code, asked) == (413, [])
    assert b"the body is refused: it has more than 1 bytes" in body
