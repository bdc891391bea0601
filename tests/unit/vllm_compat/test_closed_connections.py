"""Connections of uvicorn, vLLM's HTTP server, that are closed as it shuts down."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import uvicorn

from starling.vllm_compat.server_socket import close_connections


class Application:
    """Answers each request with an endless stream, and notes its own end."""

    def __init__(self) -> None:
        self.requests, self.events = 0, []

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
            return
        self.requests += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})

    async def live(self, receive, send) -> None:
        for end in ("startup", "shutdown"):
            await receive()
            self.events.append(end)
            await send({"type": f"lifespan.{end}.complete"})


def test_a_client_that_reads_nothing_holds_neither_the_server_nor_the_end_of_its_application():
    application = Application()

    async def scenario() -> None:
        config = uvicorn.Config(application, host="127.0.0.1", port=0, lifespan="on", log_config=None)
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        while not application.requests:
            await asyncio.sleep(0.01)
        close_connections(SimpleNamespace(server=server))
        server.should_exit = True
        await asyncio.wait_for(serving, 60)
        writer.close()

    asyncio.run(scenario())
    assert application.events == ["startup", "shutdown"]
