"""The gRPC front: starling.v1.InferenceService on the engine that the OpenAI server uses."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from engine_ext.requests import describe, star_requests
from engine_ext.serving import grpc_admin
from engine_ext.serving import grpc_messages as messages
from engine_ext.serving.errors import DuplicateRequestError, grpc_code, root
from engine_ext.serving.grpc_gate import Gate
from engine_ext.serving.serve_args import NO_ADMIN, AdminOptions, authority
from starling.v1 import admin_pb2_grpc, inference_pb2_grpc
from starling.v1 import inference_pb2 as pb

logger = init_logger("vllm.starling")

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_REQUEST_BYTES = 64 * 2**20  # some 15 million token ids
GRACE_SECONDS = 5.0

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # Else a second server could take the same port without an error and get half of the calls.
    ("grpc.so_reuseport", 0),
    # A long prefill is a silent stream: don't close the connection of a client that pings through it.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Translates calls; the engine does everything else."""

    def __init__(self, engine: Any, on_dead: Callable[[], Awaitable[None]]) -> None:
        self.engine = engine
        self.on_dead = on_dead
        self.running: set[str] = set()
        config = engine.model_config
        self.defaults = config.get_diff_sampling_param()
        # As vLLM's completions: a limit in a generation config that the user chose is a cap, else a default.
        chosen = config.generation_config not in ("auto", "vllm")
        override = config.override_generation_config.get("max_new_tokens")
        self.max_tokens_cap = self.defaults.get("max_tokens") if chosen else override

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: grpc.aio.ServicerContext) -> None:
        # A coroutine that writes, not a generator: cancelling it then closes the engine's generator, and with
        # it the request, at once, wherever it waits.
        try:
            with self._claim(request.request_id) as request_id:
                async with aclosing(self._generate(request, request_id)) as events:
                    async for event in events:
                        await context.write(event)
        except Exception as raised:
            await self._fail(root(raised), request, context)

    async def _generate(
        self, request: pb.GenerateStreamRequest, request_id: str
    ) -> AsyncGenerator[pb.GenerateStreamResponse]:
        engine_input, params, plan = await self._prepare(request)
        usage = pb.Usage(prompt_tokens=len(engine_input["prompt_token_ids"]))
        outputs = self.engine.generate(engine_input, params, request_id, priority=request.priority)
        async with aclosing(outputs):
            async for result in outputs:
                output = result.outputs[0]
                if output.finish_reason == "error":
                    raise GenerationError
                usage.cached_tokens = result.num_cached_tokens or 0
                usage.completion_tokens += len(output.token_ids)
                if output.text or output.token_ids:
                    yield messages.delta(output)
                if output.finish_reason is not None:
                    yield messages.final(output, usage, plan)

    async def _prepare(self, request: pb.GenerateStreamRequest) -> tuple[Any, Any, dict[str, Any]]:
        """Engine input, sampling parameters and described plan of a request; raises for bad input."""
        if self.engine.errored:
            raise self.engine.dead_error
        self.engine.check_admission(1)
        star = messages.star_args(request.star)
        prompt = messages.prompt_of(request)
        extras = {"cache_salt": request.cache_salt} if request.HasField("cache_salt") else {}
        validate_cache_salt(extras.get("cache_salt"))
        renderer = self.engine.renderer
        renderer.validate_token_ids(request.token_ids.ids, parameter="token_ids")
        (engine_input,) = await renderer.render_cmpl_async([prompt], prompt_extras=extras)
        num_tokens = len(engine_input["prompt_token_ids"])
        wanted = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else None
        max_tokens = get_max_tokens(
            self.engine.model_config.max_model_len, wanted, num_tokens, self.defaults, self.max_tokens_cap
        )
        if max_tokens < 1 and wanted != 0:
            room = f"The prompt of {num_tokens} tokens fills the model's context: there is no room for output."
            raise VLLMValidationError(room, parameter=messages.prompt_field(request))
        params = messages.sampling_params(request.sampling, self.defaults, max_tokens, star)
        plan = star_requests(self.engine.input_processor).plan(star, num_tokens)
        return engine_input, params, describe(plan, num_tokens)

    @contextmanager
    def _claim(self, client_id: str):
        """An id for the engine; the engine would tell two of the same name apart, its client could not."""
        if client_id in self.running:
            raise DuplicateRequestError(f"request_id {client_id!r} is running; wait for its end or choose another")
        name = client_id or uuid.uuid4().hex
        self.running.add(name)
        try:
            yield f"grpc-{name}"
        finally:
            self.running.discard(name)

    async def _fail(
        self, error: Exception, request: pb.GenerateStreamRequest, context: grpc.aio.ServicerContext
    ) -> None:
        code = grpc_code(error)
        if code is grpc.StatusCode.INTERNAL:
            logger.error("a gRPC request failed", exc_info=error)
        if isinstance(error, EngineDeadError):
            await self.on_dead()
        status = rpc_status.to_status(messages.error_status(error, code, messages.prompt_field(request)))
        await context.abort(status.code, status.details, status.trailing_metadata)


class Front:
    """The gRPC server with its health and reflection services, and AdminService's own port where it has one."""

    def __init__(self, engine: Any, api_keys: list[str], admin: AdminOptions = NO_ADMIN) -> None:
        self.admin = admin
        self.admin_server: grpc.aio.Server | None = None
        self.gate = Gate(api_keys)
        self.server = grpc.aio.server(interceptors=[self.gate], options=SERVER_OPTIONS)
        self.health = health.aio.HealthServicer()
        inference = Inference(engine, self.health.enter_graceful_shutdown)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin_servicer(engine, own_port=False), self.server)
        self.own_port_servicer = self._admin_servicer(engine, own_port=True)
        names = (SERVICE, grpc_admin.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        self._stopping: asyncio.Task | None = None

    def _admin_servicer(self, engine: Any, own_port: bool) -> grpc_admin.AdminServicer:
        return grpc_admin.AdminServicer(
            engine, self, key=self.admin.key, own_port=own_port, max_message_bytes=MAX_REQUEST_BYTES
        )

    @property
    def draining(self) -> bool:
        return self.gate.draining

    async def stop_admitting(self) -> None:
        """Refuse new calls with UNAVAILABLE and report NOT_SERVING; running ones go on."""
        self.gate.draining = True
        await self.health.enter_graceful_shutdown()

    async def start(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Listen and report SERVING; returns the port (raises RuntimeError where one can't be had)."""
        if credentials is None:
            port = self.server.add_insecure_port(address)
        else:
            port = self.server.add_secure_port(address, credentials)
        await self.server.start()
        if self.admin.port is not None:
            self.admin_server, admin_port = await grpc_admin.start_own_port(
                self.own_port_servicer, f"{authority(self.admin.host)}:{self.admin.port}", credentials, SERVER_OPTIONS
            )
            logger.info("AdminService on %s:%d", authority(self.admin.host), admin_port)
        for name in ("", SERVICE):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """NOT_SERVING, refuse new calls, let running ones end within ``grace`` seconds, then close."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(grace))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace: float) -> None:
        await self.stop_admitting()
        if await self.gate.drain(grace):
            logger.info("gRPC: every running stream has ended")
        else:
            logger.warning("gRPC: ending streams that still run after %.0f s", grace)
        await self.server.stop(None)
        if self.admin_server is not None:
            await self.admin_server.stop(None)
