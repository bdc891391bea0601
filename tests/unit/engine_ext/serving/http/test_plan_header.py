"""The header with a response's plans, as Python's http.client reads it from a real server."""

from __future__ import annotations

import asyncio
import http.client
import json

import pytest
import uvicorn

from starling.engine_ext.front.call import this_call
from starling.engine_ext.serving.http.middleware import MAX_BYTES, PlanHeader

LIMIT_OF_NGINX = 4096  # of all headers of a response together, with nginx's smallest default


async def response_of(num_prompts: int) -> http.client.HTTPResponse:
    """The response to a request of that many prompts, from uvicorn."""

    async def app(scope, receive, send):
        for tokens in range(num_prompts):
            this_call().add_plan({"attention": "dense", "prompt_tokens": tokens})
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    server = uvicorn.Server(uvicorn.Config(PlanHeader(app), port=0, lifespan="off", log_level="error"))
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        connection = http.client.HTTPConnection(*server.servers[0].sockets[0].getsockname())
        await asyncio.to_thread(connection.request, "GET", "/")
        response = await asyncio.to_thread(connection.getresponse)
        assert response.read() == b"ok"
        connection.close()
        return response
    finally:
        server.should_exit = True
        await serving


@pytest.mark.parametrize("num_prompts", [0, 1, 2, 96, 2000])
def test_a_response_has_one_header_of_bounded_size(num_prompts):
    response = asyncio.run(response_of(num_prompts))
    headers = response.headers.get_all("x-starling-plan", [])
    assert len(headers) == min(num_prompts, 1)
    assert sum(len(name) + len(value) + 4 for name, value in response.headers.items()) < LIMIT_OF_NGINX
    if num_prompts == 1:
        assert json.loads(headers[0])["prompt_tokens"] == 0
    elif num_prompts:
        shown = [plan["prompt_tokens"] for plan in json.loads(headers[0])]
        assert shown == list(range(len(shown)))
        assert len(shown) == 2 if num_prompts == 2 else len(headers[0]) <= MAX_BYTES < len(headers[0]) + 100
