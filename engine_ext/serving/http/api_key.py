"""ASGI middleware: a server with API keys asks for one on most paths, and the operator's paths need their own.

vLLM asks for an API key under /v1, /v2, /inference and /cohere. Its other paths run the model too (/invocations,
/generative_scoring, /tokenize), or change the server (/scale_elastic_ep, /pause), and have no key of their own.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.responses import JSONResponse

from starling.engine_ext.environment import ADMIN_KEY_ENV
from starling.engine_ext.front.client_keys import api_keys, authorization_of, digest, has_valid_key, path_of

OPEN_PATHS = ("/health", "/ping", "/version", "/metrics", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
OPEN_FOLDERS = ("/metrics/", "/static/")
"""Folders that, like OPEN_PATHS, serve probes, monitoring and documentation, without any data of a client."""


OPERATOR_PATHS = (
    *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/abort_requests", "/inference/v1/abort_requests"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/stop_profile"),
    *("/fault_tolerance/apply", "/fault_tolerance/status"),
    *("/v1/fault_tolerance/apply", "/v1/fault_tolerance/status"),  # since vLLM 0.34
    *("/checkpoint/prepare", "/checkpoint/restore", "/checkpoint/status"),
    *("/server_info", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc"),
    *("/sleep", "/release_kv_cache_memory", "/wake_up", "/is_sleeping", "/pause", "/resume", "/is_paused"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
    *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
    *("/weight_info", "/weight_checker", "/get_world_size"),
)
"""Paths of vLLM that change the server, or end requests of any client; most exist only with an option of vLLM."""

NO_OPERATOR = f"this path controls the server: start it with {ADMIN_KEY_ENV}, and send that key"


def is_operators(path: str) -> bool:
    """Return whether a path is one of OPERATOR_PATHS. Starlette's routes match with a line feed at the end too."""
    return path.removesuffix("\n") in OPERATOR_PATHS


def is_open(path: str) -> bool:
    """Return whether a path, without the server's --root-path, needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


class RequireKey:
    """Middleware around ``app`` that checks keys. vLLM's arguments in the application's state have the keys."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.digests: list[bytes] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # A browser sends OPTIONS without the key, to learn whether it may send the request.
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            await self.app(scope, receive, send)
            return
        if self.digests is None:
            self.digests = [digest(key) for key in api_keys(scope["app"].state.args)]
        path, admin_key = path_of(scope), os.environ.get(ADMIN_KEY_ENV)
        valid, answer = self.digests, self.app
        if is_operators(path) and admin_key:
            valid = [digest(admin_key)]
        if valid and not is_open(path) and not has_valid_key(authorization_of(scope), valid):
            body = {"error": "Unauthorized"}  # as vLLM answers
            answer = JSONResponse(body, 401, {"www-authenticate": "Bearer"})
        elif is_operators(path) and admin_key:
            scope = with_api_key(scope)
        elif is_operators(path) and valid:
            answer = JSONResponse({"error": NO_OPERATOR}, 403)
        await answer(scope, receive, send)


def with_api_key(scope: Any) -> Any:
    """Return an operator's request with an API key, because vLLM's own check knows only API keys."""
    keys = api_keys(scope["app"].state.args)
    if not keys:
        return scope
    others = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    return scope | {"headers": [*others, (b"authorization", b"Bearer " + keys[0].encode())]}
