"""ASGI middleware: a streamed HTTP response tells how far its prompt is, where the client asks for it.

With the header `x-starling-progress: true`, the event stream of /v1/completions and /v1/chat/completions starts
with comment lines, `: starling-progress {"prompt_index": 0, "computed": 4096, "prompt": 8064, ...}`. Clients of
server-sent events skip comments, so OpenAI's own work unchanged. In a response that is not streamed the header
changes nothing: there is no place to tell.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from engine_ext.requests import response_requests
from engine_ext.serving.progress import Progress, watch_prefill

HEADER = b"x-starling-progress"
PATHS = ("/v1/completions", "/v1/chat/completions")


def asks(scope: Any) -> bool:
    """Whether a request asks for progress."""
    if scope["type"] != "http" or not scope["path"].endswith(PATHS):
        return False
    return any(name.lower() == HEADER and value.strip().lower() == b"true" for name, value in scope["headers"])


def comment(prompt_index: int, progress: Progress) -> bytes:
    """One comment of an event stream; prompt_index counts the prompts of a request that has several."""
    return f": starling-progress {json.dumps({'prompt_index': prompt_index} | asdict(progress))}\n\n".encode()


class HttpProgress:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not asks(scope):
            await self.app(scope, receive, send)
            return
        request_ids: list[str] = []
        response_requests.set(request_ids)
        watchers: list[asyncio.Task] = []

        async def tell(prompt_index: int, request_id: str) -> None:
            async with aclosing(watch_prefill(scope["app"].state.engine_client, request_id)) as states:
                async for progress in states:
                    body = comment(prompt_index, progress)
                    await send({"type": "http.response.body", "body": body, "more_body": True})

        async def stop() -> None:
            for watcher in watchers:
                watcher.cancel()
            # What a watcher failed with is the connection's loss, which the response meets itself.
            await asyncio.gather(*watchers, return_exceptions=True)
            watchers.clear()

        async def send_after_progress(message: Any) -> None:
            if message["type"] == "http.response.body":
                await stop()
            await send(message)
            if message["type"] == "http.response.start" and is_event_stream(message):
                watchers.extend(asyncio.create_task(tell(*named)) for named in enumerate(request_ids))

        try:
            await self.app(scope, receive, send_after_progress)
        finally:
            await stop()


def is_event_stream(start: Any) -> bool:
    headers = {name.lower(): value for name, value in start.get("headers", [])}
    return headers.get(b"content-type", b"").startswith(b"text/event-stream")
