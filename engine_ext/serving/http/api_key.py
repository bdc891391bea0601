"""ASGI middleware: a server with API keys asks for one on every path but a few.

vLLM asks for it under /v1, /v2, /inference and /cohere. Its other paths run the model too (/invocations,
/generative_scoring, /tokenize), or change the server (/scale_elastic_ep, /pause).
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from starling.engine_ext.clients import api_keys, authorization_of, digest, has_valid_key

OPEN_PATHS = ("/health", "/ping", "/version", "/metrics", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
OPEN_FOLDERS = ("/metrics/", "/static/")
"""What probes, monitoring and readers of the documentation ask for; none of it has anything of a client."""


def is_open(path: str) -> bool:
    """Whether a path, without the server's --root-path, needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


class RequireKey:
    """The middleware around ``app``. vLLM's arguments in the application's state have the keys."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.digests: list[bytes] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or self._may_pass(scope):
            await self.app(scope, receive, send)
            return
        body = {"error": "Unauthorized"}  # as vLLM answers
        await JSONResponse(body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _may_pass(self, scope: Any) -> bool:
        if self.digests is None:
            self.digests = [digest(key) for key in api_keys(scope["app"].state.args)]
        # A browser sends OPTIONS without the key, to learn whether it may send the request.
        if not self.digests or scope.get("method") == "OPTIONS":
            return True
        if is_open(scope["path"].removeprefix(scope.get("root_path", ""))):
            return True
        return has_valid_key(authorization_of(scope), self.digests)
