"""ASGI middleware: no HTTP request outlives the engine.

On a signal vLLM stops the engine, and then waits until the clients have closed their connections. Requests that the
engine did not end get no answer, and neither they nor the server end. Here, requests that arrive meanwhile get 503, and
those that run when the engine has stopped get 503, or an error event in their stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from starlette.responses import JSONResponse

from starling.engine_ext.serving.http.progress_events import is_event_stream
from starling.vllm_compat.front import around_shutdown
from starling.vllm_compat.server_socket import close_connections

MESSAGE = "the server is shutting down"
ERROR = {"error": {"message": MESSAGE, "type": "ServiceUnavailableError", "param": None, "code": 503}}
SEND_SECONDS = 2.0
"""Seconds that clients have to receive the end of their response. Then their connections are closed."""

STILL_SERVED = ("/metrics",)


def unavailable() -> JSONResponse:
    return JSONResponse(ERROR, 503, {"retry-after": "1", "connection": "close"})


class EndWithEngine:
    """Middleware around ``app`` that ends requests with the engine."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.is_stopping = self.has_stopped = False
        self.running: set[asyncio.Task] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self._watch(scope["app"].state)
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self.is_stopping and not scope["path"].endswith(STILL_SERVED):
            await unavailable()(scope, receive, send)
        else:
            await self._run(scope, receive, send)

    def _watch(self, state: Any) -> None:
        """Register for the engine's shutdown. A server that only renders prompts has no engine."""
        if state.engine_client is None:
            return
        loop = asyncio.get_running_loop()

        def before(_: float | None) -> None:
            self.is_stopping = True

        def after() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._end_all, state)

        around_shutdown(state.engine_client, before, after)

    def _end_all(self, state: Any) -> None:
        if self.has_stopped:
            return
        self.has_stopped = True
        for task in self.running:
            task.cancel()
        asyncio.get_running_loop().call_later(SEND_SECONDS, self._close, state)

    def _close(self, state: Any) -> None:
        """Close the present connections, again and again, because clients may still make new ones."""
        close_connections(state)
        asyncio.get_running_loop().call_later(SEND_SECONDS, self._close, state)

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        task, start, complete = asyncio.current_task(), None, False
        assert task is not None

        async def send_noted(message: Any) -> None:
            nonlocal start, complete
            start = message if message["type"] == "http.response.start" else start
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        self.running.add(task)
        try:
            await self.app(scope, receive, send_noted)
        except (asyncio.CancelledError, Exception):  # what an application does that is cancelled, or has no engine
            if not self.has_stopped or complete:
                raise
            task.uncancel()
            if start is None:
                await unavailable()(scope, receive, send)
            elif is_event_stream(start):
                await send({"type": "http.response.body", "body": f"data: {json.dumps(ERROR)}\n\n".encode()})
            else:
                raise
        finally:
            self.running.discard(task)
