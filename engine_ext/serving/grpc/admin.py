"""The service starling.v1.AdminService: server and cache state, abort, reset and drain; and who may call it."""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import grpc
import torch
from grpc_reflection.v1alpha import reflection
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from starling.attention_backends.star.refusals import star_refusals
from starling.config.star import StarOptions
from starling.engine_ext.front.cache_salt import digest, has_valid_key
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.serving.grpc.arrivals import ArrivalInterceptor
from starling.engine_ext.serving.grpc.auth import (
    ADMIN_METHODS,
    SEVERAL_KEYS,
    Continuation,
    Metadata,
    add_port,
    authorization,
    has_several_keys,
    host_of,
    refusal_handler,
)
from starling.engine_ext.serving.grpc.messages import MODES, DrainingError, abort
from starling.engine_ext.serving.grpc.server_options import MAX_ADMIN_BYTES, server_options
from starling.scheduler.cache_state import ATTENTION_BACKENDS, CACHE_STATE
from starling.v1 import admin_pb2 as pb
from starling.v1 import admin_pb2_grpc, inference_pb2
from starling.vllm_compat.front import num_engine_cores, refuse_admission, request_state, unfinished_ids
from starling.vllm_compat.versions import vllm_version

logger = init_logger("vllm.starling")

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
MAX_WAIT_SECONDS = 86400.0
POLL_SECONDS = 0.05

ANSWER_SECONDS = 5.0
"""Seconds to wait for the state of a replica. A replica answers between two of its steps."""

NO_ACCESS = (
    "this method is the operator's, and not open here: start the server with --grpc-admin-port PORT and call that "
    "port, or with --grpc-admin-key KEY (or STARLING_ADMIN_KEY) and send the metadata `authorization: Bearer KEY`"
)
WRONG_KEY = "this method needs the metadata `authorization: Bearer KEY` with the key of --grpc-admin-key"

Refusal = tuple[grpc.StatusCode, str]


def refusal(metadata: Metadata, key: str | None, own_port: bool) -> Refusal | None:
    """Return the code and the reason with which a call is refused, or None if the call is allowed.

    Without a key, the service is open on its own port and closed on the gRPC port. With a key, every call needs it.

    Args:
        metadata: metadata of the call.
        key: the server's admin key, or None if it has none.
        own_port: whether the call came in on the port that serves AdminService alone.
    """
    if has_several_keys(metadata):
        return grpc.StatusCode.UNAUTHENTICATED, SEVERAL_KEYS
    if key is None:
        return None if own_port else (grpc.StatusCode.PERMISSION_DENIED, NO_ACCESS)
    return (
        None if has_valid_key(authorization(metadata), [digest(key)]) else (grpc.StatusCode.UNAUTHENTICATED, WRONG_KEY)
    )


def matching_request_ids(
    request_id: str, front_ids: Iterable[str], engine_ids: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Return the requests that a client's id stands for: (ids that a front gave, the engine's own ids).

    vLLM knows a gRPC request as `grpc-<id>`, and each prompt of an OpenAI completion as `<id>-<index>`. The engine's
    ids are compared only if no front's id matches.
    """
    prompts = r"(-\d+)?" if request_id.startswith("cmpl-") else ""
    pattern = re.compile(rf"(grpc-)?{re.escape(request_id)}{prompts}")
    from_front = [name for name in front_ids if pattern.fullmatch(name)]
    return from_front, [] if from_front else [name for name in engine_ids if name == request_id]


class AdminInterceptor(grpc.aio.ServerInterceptor):
    """Interceptor that refuses AdminService's calls as ``refusal`` says; on a port of its own, also reflection's.

    Args:
        key: the admin key, or None.
        own_port: whether the port serves AdminService alone.
        methods: prefixes of the methods that need the admin key.
    """

    def __init__(self, key: str | None, own_port: bool, methods: tuple[str, ...] = ADMIN_METHODS) -> None:
        self.key = key
        self.own_port = own_port
        self.methods = methods

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or not (self.own_port or handler_call_details.method.startswith(self.methods)):
            return handler
        refused = refusal(handler_call_details.invocation_metadata, self.key, self.own_port)
        return handler if refused is None else refusal_handler(handler, *refused)


class Admission(Protocol):
    """The part of the gRPC server that AdminService needs."""

    @property
    def draining(self) -> bool: ...

    async def stop_admitting(self) -> None:
        """Refuse new gRPC calls with UNAVAILABLE, and report NOT_SERVING. Further calls change nothing."""


def answering(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Make a method that gRPC can call with a context too; an error ends the call with its status."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request)
        except Exception as error:
            await abort(context, error, getattr(error, "parameter", None) or "")

    return answer


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """AdminService on one port.

    Args:
        engine: the AsyncLLM of both fronts.
        front: the gRPC server; Drain stops its admission.
        max_message_bytes: the server's limit of a message, for GetServerInfo.
    """

    def __init__(self, engine: Any, front: Admission, *, max_message_bytes: int) -> None:
        self.engine = engine
        self.front = front
        self.max_message_bytes = max_message_bytes
        self.started = time.monotonic()
        self.backends: list[str] | None = None

    @answering
    async def GetServerInfo(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        config = self.engine.vllm_config
        defaults = front_state(self.engine).planner.defaults
        if self.backends is None:
            await self._look_up_backends()
        names = config.model_config.served_model_name
        return pb.GetServerInfoResponse(
            starling_version=importlib.metadata.version("vllm-starling"),
            vllm_version=vllm_version(),
            torch_version=torch.__version__,
            models=[names] if isinstance(names, str) else names,
            uptime_seconds=time.monotonic() - self.started,
            star_defaults=star_message(defaults) if defaults else None,
            limits=limits(config, self.max_message_bytes),
            draining=self.front.draining,
            attention_backends=self.backends or (),
            refused_features=[pb.RefusedFeature(feature="star", reason=reason) for reason in star_refusals(config)],
        )

    async def _look_up_backends(self) -> None:
        """Ask the replicas for their attention backends. All have the same ones, so one answer is enough."""
        of_engines = await front_state(self.engine).rpc.ask_all(self.engine, ANSWER_SECONDS, ATTENTION_BACKENDS)
        if of_engines:
            self.backends = sorted({name for names in of_engines.values() for name in names})

    @answering
    async def GetCacheState(self, request: pb.GetCacheStateRequest) -> pb.GetCacheStateResponse:
        rpc = front_state(self.engine).rpc
        engines = await rpc.ask_all(self.engine, ANSWER_SECONDS, CACHE_STATE, request.per_request)
        for engine in engines.values():
            for held in engine.get("requests", ()):
                self._add_front_state(held)
        unanswered = [rank for rank in range(num_engine_cores(self.engine)) if rank not in engines]
        return pb.GetCacheStateResponse(
            engines=[pb.EngineCache(**engine) for engine in engines.values()], unanswered=unanswered
        )

    def _add_front_state(self, request: dict[str, Any]) -> None:
        """Add the front's part: the client's id and, once the prompt is prefilled, its cached tokens."""
        state = request_state(self.engine, request["engine_request_id"])
        if state is not None:
            request["request_id"] = state.external_req_id
            if not state.is_prefilling:
                request["cached_tokens"] = state.num_cached_tokens

    @answering
    async def Abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        request_ids = request.request_ids
        if not request_ids or "" in request_ids:
            reason = "request_ids needs at least one id, and no id may be empty"
            raise VLLMValidationError(reason, parameter="request_ids")
        response = pb.AbortResponse()
        state = front_state(self.engine)
        for request_id in dict.fromkeys(request_ids):
            of_fronts, of_engine = unfinished_ids(self.engine)
            # The engine does not know a split prompt that waits for memory, or whose parts have just ended.
            known = dict.fromkeys([*of_fronts, *state.waiting()])
            front_ids, engine_ids = matching_request_ids(request_id, known, of_engine)
            if front_ids:
                await self.engine.abort(front_ids)
            elif engine_ids:
                await self.engine.abort(engine_ids, internal=True)
            (response.found if front_ids or engine_ids else response.unknown).append(request_id)
        logger.info("admin: aborted %d of %d requests", len(response.found), len(request_ids))
        return response

    @answering
    async def ResetPrefixCache(self, request: pb.ResetPrefixCacheRequest) -> pb.ResetPrefixCacheResponse:
        reset = await self.engine.reset_prefix_cache()
        logger.info("admin: prefix cache %s", "reset" if reset else "not reset: requests hold pages")
        return pb.ResetPrefixCacheResponse(reset=reset)

    @answering
    async def Drain(self, request: pb.DrainRequest) -> pb.DrainResponse:
        wait_seconds = request.wait_seconds
        if not 0 <= wait_seconds <= MAX_WAIT_SECONDS or math.isnan(wait_seconds):
            reason = f"wait_seconds={wait_seconds} is refused: it is not from 0 to {MAX_WAIT_SECONDS:.0f}"
            raise VLLMValidationError(reason, parameter="wait_seconds")
        if not self.front.draining:
            logger.info("admin: draining, no more requests are admitted")
        await self.front.stop_admitting()
        refuse_admission(self.engine, DrainingError)
        deadline = time.monotonic() + wait_seconds
        while (left := self.engine.get_num_unfinished_requests()) and time.monotonic() < deadline:
            if self.engine.errored:
                raise self.engine.dead_error
            await asyncio.sleep(POLL_SECONDS)
        return pb.DrainResponse(requests_left=left)


def limits(config: Any, max_message_bytes: int) -> pb.Limits:
    """Return the limits of requests, from vLLM's configuration."""
    scheduling = config.scheduler_config
    return pb.Limits(
        max_model_tokens=config.model_config.max_model_len,
        max_running_requests=scheduling.max_num_seqs,
        max_step_tokens=scheduling.max_num_batched_tokens,
        max_queued_requests=scheduling.max_num_queued_reqs,
        max_queued_tokens=scheduling.max_num_queued_tokens,
        max_message_bytes=max_message_bytes,
    )


def star_message(star: StarOptions) -> inference_pb2.StarOptions:
    """Return the server's star options; options that are derived from the prompt or from other options stay unset."""
    mode = next(number for number, name in MODES.items() if name == star.mode)
    values: dict[str, int | str | bool] = {
        "mode": mode,
        "replicas": 0 if star.replicas == "auto" else star.replicas,
        "shards": star.shards == "on",
        "adapter": star.adapter == "auto",
    }
    if star.block_size is not None:
        values["block_size"] = str(star.block_size)
    return inference_pb2.StarOptions(**star.model_dump(exclude_none=True) | values)


async def start_admin_server(
    servicer: AdminServicer, key: str | None, address: str, credentials: grpc.ServerCredentials | None
) -> tuple[grpc.aio.Server, int]:
    """Serve AdminService and reflection on a port of their own, and return the server and the port.

    Raises:
        RuntimeError: the server can't listen there.
    """
    interceptors = [AdminInterceptor(key, own_port=True), ArrivalInterceptor(host_of)]
    server = grpc.aio.server(interceptors=interceptors, options=server_options(MAX_ADMIN_BYTES))
    admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server)
    port = add_port(server, address, credentials)
    await server.start()
    return server, port
