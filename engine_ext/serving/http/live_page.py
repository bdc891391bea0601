"""ASGI middleware: a page that shows the requests while they run, and the JSON that it polls (docs/monitoring.md).

The page itself has no data, so it needs no key: a browser can't send one with a link. Its script asks for the key, and
sends it with each request for the JSON. The responses lack vLLM's CORS headers: only pages of this server read them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response
from vllm.exceptions import RetryableRequestError
from vllm.v1.engine.exceptions import EngineDeadError

from starling.config.entry import ADMIN_KEY_ENV, LIVE_DATA, LIVE_PATH
from starling.engine_ext.front.cache_salt import api_keys, authorization_of, digest, has_valid_key, path_of
from starling.engine_ext.front.live import LiveView

MAX_RESPONSES = 32
"""Most data responses in progress at once; further ones get 503. A viewer's one a second takes milliseconds."""

SEND_SECONDS = 10.0
"""Seconds that a viewer may take to receive a response."""

HEADERS = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

PAGE = Path(__file__).with_suffix(".html").read_bytes()


def content_policy(page: bytes) -> str:
    """Return a page's Content-Security-Policy: its own script and style, by digest, and requests to its server."""

    def source(tag: bytes) -> str:
        content = re.search(b"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        assert content is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(content[1]).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {source(b'script')}; style-src {source(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


PAGE_HEADERS = HEADERS | {"content-security-policy": content_policy(PAGE), "content-type": "text/html; charset=utf-8"}


class LivePage:
    """Middleware around ``app`` that serves the page and its data."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.view: LiveView | None = None
        self.num_responses = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = path_of(scope) if scope["type"] == "http" else None
        if path not in (LIVE_PATH, LIVE_DATA):
            await self.app(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD"):
            await refused(405, "only GET", {"allow": "GET, HEAD"})(scope, receive, send)
        elif path == LIVE_PATH:
            await Response(PAGE, headers=PAGE_HEADERS)(scope, receive, send)
        elif not may_look(scope):
            await refused(401, "Unauthorized", {"www-authenticate": "Bearer"})(scope, receive, send)
        elif self.num_responses >= MAX_RESPONSES:
            await refused(503, f"{MAX_RESPONSES} viewers wait already", {"retry-after": "2"})(scope, receive, send)
        else:
            self.num_responses += 1
            try:
                response = await self._data(scope)
                async with asyncio.timeout(SEND_SECONDS):
                    await response(scope, receive, send)
            except TimeoutError:  # a viewer that does not read; its connection is closed
                pass
            finally:
                self.num_responses -= 1

    async def _data(self, scope: Any) -> Response:
        if self.view is None:
            self.view = LiveView(scope["app"].state.engine_client)
        try:
            return Response(await self.view.body(), headers=HEADERS | {"content-type": "application/json"})
        except (EngineDeadError, RetryableRequestError) as error:
            return refused(503, str(error), {"retry-after": "2"})


def may_look(scope: Any) -> bool:
    """Return whether a request for the data has a key that allows seeing all requests.

    That is the admin key if the server has one, else any key of a client.
    """
    admin_key = os.environ.get(ADMIN_KEY_ENV)
    keys = [admin_key] if admin_key else api_keys(scope["app"].state.args)
    return not keys or has_valid_key(authorization_of(scope), [digest(key) for key in keys])


def refused(status: int, reason: str, headers: dict[str, str]) -> Response:
    return JSONResponse({"error": reason}, status, HEADERS | headers)
