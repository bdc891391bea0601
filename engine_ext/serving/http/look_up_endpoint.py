"""ASGI middleware: `POST /starling/cached` and the path of a request says how much of its prompt the server has cached.

A router sends the body of a request to several servers, and then the request itself to the one that has the most. The
request goes its usual way, with all checks and bounds, until it would run: see engine_ext/front/look_up.py.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from starling.engine_ext.front.call import this_call
from starling.engine_ext.front.client_keys import path_of

CACHED_PATH = "/starling/cached"
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")

NOT_FOUND = f"{CACHED_PATH} goes before {', '.join(PATHS[:-1])} or {PATHS[-1]}"
HIDDEN = "this server does not say what is cached: start it with --star-segments, or --enable-prompt-tokens-details"


class AnswerCachedTokens:
    """Middleware around ``app`` that answers with the cached tokens, inside the one that makes the Call."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = path_of(scope) if scope["type"] == "http" else ""
        if path != CACHED_PATH and not path.startswith(f"{CACHED_PATH}/"):
            await self.app(scope, receive, send)
            return
        path, call = path.removeprefix(CACHED_PATH), this_call()
        if path not in PATHS:
            await JSONResponse({"error": NOT_FOUND}, 404)(scope, receive, send)
        elif not call.sees_cached:
            await JSONResponse({"error": HIDDEN}, 403)(scope, receive, send)
        else:
            call.only_looks_up = True
            held: list[Any] = []

            async def hold(message: Any) -> None:
                held.append(message)

            inner = scope.get("root_path", "") + path
            await self.app(scope | {"path": inner, "raw_path": inner.encode()}, receive, hold)
            if call.cached is not None:
                await JSONResponse(call.cached)(scope, receive, send)
                return
            for message in held:  # an error
                await send(message)
