"""ASGI middleware: adds a prompt's prefill progress to a streamed HTTP response if the client requests it.

With the header `x-starling-progress: true`, the event stream of /v1/completions and /v1/chat/completions starts with
comment lines, `: starling-progress {"prompt_index": 0, "computed": 4096, "prompt": 8064, ...}`. Clients of server-sent
events skip comments, so OpenAI's own clients work unchanged. The header has no effect on a response that is not
streamed.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from starling.engine_ext.front.call import this_call
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.progress import Progress

HEADER = b"x-starling-progress"
PATHS = ("/v1/completions", "/v1/chat/completions")


def wants_progress(scope: Any) -> bool:
    """Return whether a request has the header, and a path that supports it."""
    if scope["type"] != "http" or not scope["path"].endswith(PATHS):
        return False
    return any(name.lower() == HEADER and value.strip().lower() == b"true" for name, value in scope["headers"])


def comment(prompt_index: int, progress: Progress) -> bytes:
    """Return a comment of the event stream; ``prompt_index`` counts the prompts of a request that has several."""
    numbers = {name: value for name, value in asdict(progress).items() if value is not None}
    return f": starling-progress {json.dumps({'prompt_index': prompt_index} | numbers)}\n\n".encode()


class HttpProgress:
    """Middleware around ``app`` that adds the progress."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not wants_progress(scope):
            await self.app(scope, receive, send)
            return
        request_ids = this_call().request_ids
        watchers: list[asyncio.Task] = []

        async def send_progress(prompt_index: int, request_id: str) -> None:
            engine = scope["app"].state.engine_client
            async with aclosing(front_state(engine).poller.watch(engine, request_id)) as updates:
                async for progress in updates:
                    body = comment(prompt_index, progress)
                    await send({"type": "http.response.body", "body": body, "more_body": True})

        async def stop() -> None:
            for watcher in watchers:
                watcher.cancel()
            # A watcher fails where the connection is lost, and then the response fails too.
            await asyncio.gather(*watchers, return_exceptions=True)
            watchers.clear()

        async def send_after_progress(message: Any) -> None:
            if message["type"] == "http.response.body":
                await stop()
            await send(message)
            if message["type"] == "http.response.start" and is_event_stream(message):
                watchers.extend(asyncio.create_task(send_progress(*item)) for item in enumerate(request_ids))

        try:
            await self.app(scope, receive, send_after_progress)
        finally:
            await stop()


def is_event_stream(start: Any) -> bool:
    """Return whether the response that this ASGI message starts is an event stream."""
    headers = {name.lower(): value for name, value in start.get("headers", [])}
    return headers.get(b"content-type", b"").startswith(b"text/event-stream")
