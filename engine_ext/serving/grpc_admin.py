"""starling.v1.AdminService: what runs, what the cache holds; abort, reset and drain. And who may call it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import grpc
import torch
from google.rpc import status_pb2
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from engine_ext import compat
from engine_ext.activation import parse_config
from engine_ext.refusals import star_refusals
from engine_ext.serving import grpc_messages
from engine_ext.serving.errors import DrainingError, grpc_code
from engine_ext.serving.grpc_gate import Reader, bears, digest
from engine_ext.serving.grpc_messages import MODES
from scheduler.core_utilities import ATTENTION_BACKENDS, CACHE_STATE
from scheduler.options import StarOptions
from starling.v1 import admin_pb2 as pb
from starling.v1 import admin_pb2_grpc, inference_pb2

logger = init_logger("vllm.starling")

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
MAX_WAIT_SECONDS = 86400.0
LOOK_SECONDS = 0.05

CLOSED = (
    "AdminService is not open here: start the server with --grpc-admin-port PORT and call that port, or with "
    "--grpc-admin-key KEY (or STARLING_ADMIN_KEY) and send the metadata `authorization: Bearer KEY`"
)
WRONG_KEY = "AdminService needs the metadata `authorization: Bearer KEY` with the key of --grpc-admin-key"

Refusal = tuple[grpc.StatusCode, str]
Response = TypeVar("Response")


def refusal(metadata: Iterable[tuple[str, str | bytes]] | None, key: str | None, own_port: bool) -> Refusal | None:
    """Why a call is refused, with its code; None where it is let through.

    Without a key, the service is open on its own port and closed elsewhere; with one, every call must bear it.

    Args:
        metadata: of the call.
        key: the server's admin key; None where it has none.
        own_port: whether the call came in on the port that is AdminService's alone.
    """
    if key is None:
        return None if own_port else (grpc.StatusCode.PERMISSION_DENIED, CLOSED)
    return None if bears(metadata, [digest(key)]) else (grpc.StatusCode.UNAUTHENTICATED, WRONG_KEY)


def named(request_id: str, front_ids: Iterable[str], engine_ids: Iterable[str]) -> tuple[list[str], list[str]]:
    """The requests that an id of a client means: (ids of a front, ids of the engine); the latter only where
    there are none of the former.

    In vLLM a gRPC request is `grpc-<id>`, and each prompt of an OpenAI completion `<id>-<index>`.
    """
    prompts = r"(-\d+)?" if request_id.startswith("cmpl-") else ""
    whole = re.compile(rf"(grpc-)?{re.escape(request_id)}{prompts}")
    of_front = [name for name in front_ids if whole.fullmatch(name)]
    return of_front, [] if of_front else [name for name in engine_ids if name == request_id]


class Admission(Protocol):
    """The front, as far as Drain needs it."""

    @property
    def draining(self) -> bool: ...

    async def stop_admitting(self) -> None:
        """Refuse new gRPC calls with UNAVAILABLE, and report NOT_SERVING; a second call changes nothing."""


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Serves one port: the front's (``own_port`` false), or AdminService's alone.

    Args:
        engine: the AsyncLLM of both fronts.
        front: whose admission Drain stops.
        key: the admin key, or None.
        max_message_bytes: what the server lets a message have, to tell.
    """

    def __init__(
        self, engine: Any, front: Admission, *, key: str | None, own_port: bool, max_message_bytes: int
    ) -> None:
        self.engine = engine
        self.front = front
        self.key = key
        self.own_port = own_port
        self.max_message_bytes = max_message_bytes
        self.started = time.monotonic()
        self.backends: list[str] | None = None

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        return await self._serve(context, self._server_info)

    async def GetCacheState(self, request: pb.GetCacheStateRequest, context: Any) -> pb.GetCacheStateResponse:
        return await self._serve(context, self._cache_state, request.per_request)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        return await self._serve(context, self._abort, request.request_ids)

    async def ResetPrefixCache(self, request: pb.ResetPrefixCacheRequest, context: Any) -> pb.ResetPrefixCacheResponse:
        return await self._serve(context, self._reset)

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        return await self._serve(context, self._drain, request.wait_seconds)

    async def _serve(self, context: Any, answer: Callable[..., Awaitable[Response]], *args: Any) -> Response:
        refused = refusal(context.invocation_metadata(), self.key, self.own_port)
        if refused is not None:
            await context.abort(*refused)
        try:
            return await answer(*args)
        except Exception as error:
            status = rpc_status.to_status(error_status(error))
        await context.abort(status.code, status.details, status.trailing_metadata)
        raise AssertionError("abort has raised")

    async def _server_info(self) -> pb.GetServerInfoResponse:
        config = self.engine.vllm_config
        starling = parse_config(config.additional_config)
        if self.backends is None:
            of_engines = await compat.call_core(self.engine, ATTENTION_BACKENDS)
            self.backends = sorted({name for names in of_engines for name in names})
        names = config.model_config.served_model_name
        return pb.GetServerInfoResponse(
            starling_version=importlib.metadata.version("vllm-starling"),
            vllm_version=compat.vllm_version(),
            torch_version=torch.__version__,
            models=[names] if isinstance(names, str) else names,
            uptime_seconds=time.monotonic() - self.started,
            star_defaults=star_message(starling.star) if starling else None,
            limits=limits(config, self.max_message_bytes),
            draining=self.front.draining,
            attention_backends=self.backends,
            refused_features=[pb.RefusedFeature(feature="star", reason=reason) for reason in star_refusals(config)],
        )

    async def _cache_state(self, per_request: bool) -> pb.GetCacheStateResponse:
        engines = await compat.call_core(self.engine, CACHE_STATE, per_request)
        for engine in engines:
            for request in engine.get("requests", ()):
                self._add_what_the_front_knows(request)
        return pb.GetCacheStateResponse(engines=[pb.EngineCache(**engine) for engine in engines])

    def _add_what_the_front_knows(self, request: dict[str, Any]) -> None:
        known = compat.front_request(self.engine, request["engine_request_id"])
        if known is not None:
            request["request_id"] = known.external_req_id
            if not known.is_prefilling:
                request["cached_tokens"] = known.num_cached_tokens

    async def _abort(self, request_ids: Sequence[str]) -> pb.AbortResponse:
        if not request_ids or "" in request_ids:
            raise VLLMValidationError("request_ids needs at least one id, and none empty", parameter="request_ids")
        answer = pb.AbortResponse()
        for request_id in dict.fromkeys(request_ids):
            of_front, of_engine = named(request_id, *compat.unfinished_ids(self.engine))
            if of_front:
                await self.engine.abort(of_front)
            elif of_engine:
                await self.engine.abort(of_engine, internal=True)
            (answer.found if of_front or of_engine else answer.unknown).append(request_id)
        logger.info("admin: aborted %d of %d requests", len(answer.found), len(request_ids))
        return answer

    async def _reset(self) -> pb.ResetPrefixCacheResponse:
        reset = await self.engine.reset_prefix_cache()
        logger.info("admin: prefix cache %s", "reset" if reset else "not reset: requests hold pages")
        return pb.ResetPrefixCacheResponse(reset=reset)

    async def _drain(self, wait_seconds: float) -> pb.DrainResponse:
        if not 0 <= wait_seconds <= MAX_WAIT_SECONDS or math.isnan(wait_seconds):
            reason = f"wait_seconds={wait_seconds} is refused: it is not from 0 to {MAX_WAIT_SECONDS:.0f}"
            raise VLLMValidationError(reason, parameter="wait_seconds")
        if not self.front.draining:
            logger.info("admin: draining, no more requests are admitted")
        await self.front.stop_admitting()
        compat.refuse_admission(self.engine, DrainingError())
        deadline = time.monotonic() + wait_seconds
        while (left := self.engine.get_num_unfinished_requests()) and time.monotonic() < deadline:
            if self.engine.errored:
                raise self.engine.dead_error
            await asyncio.sleep(LOOK_SECONDS)
        return pb.DrainResponse(requests_left=left)


def limits(config: Any, max_message_bytes: int) -> pb.Limits:
    """What bounds requests, from vLLM's configuration."""
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
    """The server's star options; those that follow from the prompt or from others stay unset."""
    mode = next(number for number, name in MODES.items() if name == star.mode)
    values = {"mode": mode, "replicas": 0 if star.replicas == "auto" else star.replicas, "shards": star.shards == "on"}
    return inference_pb2.StarOptions(**star.model_dump(exclude_none=True) | values)


def error_status(error: Exception) -> status_pb2.Status:
    """A status with the exception's code and message; bad input also names the field, as these calls call it."""
    code = grpc_code(error)
    if code is grpc.StatusCode.INTERNAL:
        logger.error("an admin call failed", exc_info=error)
    return grpc_messages.error_status(error, code, getattr(error, "parameter", None) or "")


async def start_own_port(
    servicer: AdminServicer, address: str, credentials: grpc.ServerCredentials | None, options: Sequence[Any]
) -> tuple[grpc.aio.Server, int]:
    """Serve AdminService, and reflection to find it; returns the server and its port.

    Raises:
        RuntimeError: the port can't be had.
    """
    server = grpc.aio.server(interceptors=[Reader()], options=options)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    await server.start()
    return server, port
