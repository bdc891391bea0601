"""ASGI middleware: keys, the Call, plan header, progress events, look-ups, OpenAPI document, and the server's end.

The outermost one makes the Call, in which the others note what they learn of the request. When the application starts,
it notes the application's list of models, which alone knows LoRA adapters by name, and
begins to watch the size of requests' heads, and, once it has started, the event loop. An application whose process does
not have Starling's hooks does not start: vLLM makes the process of each of several API servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, aclosing
from dataclasses import asdict
from typing import Any

from starlette.responses import JSONResponse
from vllm.logger import init_logger

from starling.config.entry import ADMIN_KEY_ENV
from starling.engine_ext.front.bounds import HEAD
from starling.engine_ext.front.cache_salt import api_keys, authorization_of, bearer_key, digest, has_valid_key, path_of
from starling.engine_ext.front.call import Call, current_call, this_call
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.loop_watch import watch_loop
from starling.engine_ext.front.progress import Progress
from starling.vllm_compat.front import around_shutdown, is_hooked
from starling.vllm_compat.server_socket import bound_request_heads, close_connections

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


PROGRESS_HEADER = b"x-starling-progress"
PROGRESS_PATHS = ("/v1/completions", "/v1/chat/completions")


def wants_progress(scope: Any) -> bool:
    """Return whether a request has the header, and a path that supports it."""
    if scope["type"] != "http" or not scope["path"].endswith(PROGRESS_PATHS):
        return False
    return any(name.lower() == PROGRESS_HEADER and value.strip().lower() == b"true" for name, value in scope["headers"])


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
