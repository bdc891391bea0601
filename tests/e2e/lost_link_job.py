"""A server whose prompts never end, run by test_lost_link.py: it prints a line when a request starts or ends.

Arguments: the address, and the seconds until a lost connection ends; 0 for the server's own values.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial

import uvicorn

from starling.engine_ext.serving.cli import serve
from starling.engine_ext.serving.grpc import server_options
from starling.engine_ext.serving.grpc.server import Front
from starling.vllm_compat.server_socket import on_server_socket
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine

GRPC_PORT, HTTP_PORT = 50051, 8000
say = partial(print, flush=True)


class Endless(FakeEngine):
    async def generate(self, *args, **kwargs):
        say("grpc started")
        try:
            async for output in super().generate(*args, **kwargs):
                yield output
        finally:
            say("grpc ended")


async def app(scope, receive, send):
    """vLLM's routes end a request when uvicorn says that the client has disconnected."""
    assert (await receive())["type"] == "http.request"
    say("http started")
    assert (await receive())["type"] == "http.disconnect"
    say("http ended")


async def serve_here(address: str, seconds: int) -> None:
    from vllm.entrypoints.launchers import launcher

    if seconds:
        own = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": (seconds - 1) * 1000}
        server_options.SERVER_OPTIONS = tuple(
            (name, own.get(name, value)) for name, value in server_options.SERVER_OPTIONS
        )
        serve.IDLE_SECONDS, serve.INTERVAL_SECONDS, serve.PROBES = 1, 1, seconds - 1
    on_server_socket(serve.end_lost_connections)
    await Front(Endless(None), []).start(f"{address}:{GRPC_PORT}", None)
    with launcher.create_server_socket((address, HTTP_PORT), reuse_port=False) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        listener.listen()  # a client that comes before uvicorn has started waits, and is not refused
        say("ready")
        await server.serve([listener])


if __name__ == "__main__":
    asyncio.run(serve_here(sys.argv[1], int(sys.argv[2])))
