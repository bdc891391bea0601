"""ASGI middleware of each request: its Call, its plan in a header, look-ups of cached tokens, and the OpenAPI document.

The outermost one makes the Call, in which the others note what they learn of the request. When the application starts,
it notes the application's list of models, which alone knows LoRA adapters by name, and
begins to watch the size of requests' heads, and, once it has started, the event loop. An application whose process does
not have Starling's hooks does not start: vLLM makes the process of each of several API servers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from starlette.responses import JSONResponse
from vllm.logger import init_logger

from starling.engine_ext.front.bounds import HEAD
from starling.engine_ext.front.call import Call, current_call, this_call
from starling.engine_ext.front.client_keys import authorization_of, bearer_key, path_of
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.loop_watch import watch_loop
from starling.vllm_compat.front import is_hooked
from starling.vllm_compat.server_socket import bound_request_heads

NOT_HOOKED = "Starling is not in this vLLM: this process runs vLLM's own front"


class NoteClient:
    """Middleware around ``app`` that makes the Call of each request."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            key = bearer_key(authorization_of(scope))
            current_call.set(Call(key, scope["app"].state.args.enable_prompt_tokens_details))
        elif scope["type"] == "lifespan":
            state = scope["app"].state
            if state.engine_client is not None and not is_hooked():
                await receive()
                await send({"type": "lifespan.startup.failed", "message": NOT_HOOKED})
                return
            if state.engine_client is not None:  # else a server that only renders prompts
                front_state(state.engine_client).set_serving_models(state.openai_serving_models)
            bound_request_heads(HEAD.limit)
            await self._watched(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _watched(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application's lifespan, and watch its event loop once the application has started."""
        with ExitStack() as stack:

            async def send_and_watch(message: Any) -> None:
                await send(message)
                if message["type"] == "lifespan.startup.complete":
                    stack.callback(watch_loop().stop)

            await self.app(scope, receive, send_and_watch)


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


HEADER = b"x-starling-plan"
MAX_BYTES = 2048
SOURCES, MAX_SOURCES = "document_sources", 32
"""Field of a plan, and the largest number of documents that the header lists in it."""


def header_value(plans: Sequence[dict[str, Any]]) -> bytes:
    """Return the header's value for the plans of a response, at least one."""
    if len(plans) == 1:
        return json.dumps(with_few_sources(plans[0], MAX_SOURCES)).encode()
    shown, size = [], len("[]")
    for plan in (with_few_sources(plan, 0) for plan in plans):
        shown.append(json.dumps(plan))
        size += len(shown[-1]) + len(", ")
        if size > MAX_BYTES:
            shown.pop()
            break
    return f"[{', '.join(shown)}]".encode()


def with_few_sources(plan: dict[str, Any], most: int) -> dict[str, Any]:
    """Return a plan that lists the sources of at most ``most`` documents, each with only the kinds that have tokens."""
    if SOURCES not in plan:
        return plan
    listed = [{kind: tokens for kind, tokens in counts.items() if tokens} for counts in plan[SOURCES][:most]]
    others = {key: value for key, value in plan.items() if key != SOURCES}
    return others | ({SOURCES: listed} if listed else {})


class PlanHeader:
    """Middleware around ``app`` that adds the header."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = this_call()

        async def send_with_plans(message: Any) -> None:
            if message["type"] == "http.response.start" and call.plans:
                headers = [*message.get("headers", []), (HEADER, header_value(call.plans))]
                message = message | {"headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_plans)
