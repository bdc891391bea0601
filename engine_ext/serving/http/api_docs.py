"""ASGI middleware: the description of the API, `/openapi.json`, is made before the server takes requests.

FastAPI makes it at its first request, which takes over a second of the event loop, while all clients wait.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.starling")


class DescribeApi:
    """Middleware around ``app`` that makes the description at the start."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" and scope["app"].openapi_url is not None:
            try:
                await asyncio.to_thread(scope["app"].openapi)  # which keeps it; clients of gRPC may be served already
            except Exception:  # of a path that a plugin has added
                logger.exception("/openapi.json can't be made")
        await self.app(scope, receive, send)
