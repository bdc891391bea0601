"""The gRPC front: starling.v1.InferenceService on the engine that the OpenAI server uses."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.logger import init_logger
from vllm.renderers import ChatParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from engine_ext import compat
from engine_ext.requests import star_requests, tokens_alone
from engine_ext.serving import grpc_admin
from engine_ext.serving.errors import DuplicateRequestError, grpc_code, root
from engine_ext.serving.grpc_capabilities import capabilities
from engine_ext.serving.grpc_gate import Gate, Reader
from engine_ext.serving.grpc_messages import RETRY_SECONDS, error_status, given, star_args
from engine_ext.serving.grpc_outputs import deltas, final, prompt_logprobs
from engine_ext.serving.grpc_progress import with_progress
from engine_ext.serving.grpc_prompts import GenerateRequest, prompt_field, render
from engine_ext.serving.grpc_sampling import TEXT_FIELDS, constraint_path, sampling_params
from engine_ext.serving.grpc_upload import UploadRoom, as_upload_event
from engine_ext.serving.progress import watch_prefill
from engine_ext.serving.serve_args import NO_ADMIN, AdminOptions, authority
from starling.client.reply import Reply
from starling.v1 import admin_pb2_grpc, inference_pb2_grpc
from starling.v1 import inference_pb2 as pb

logger = init_logger("vllm.starling")

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_REQUEST_BYTES = 64 * 2**20  # some 15 million token ids
GRACE_SECONDS = 5.0
WATCH_SECONDS = 0.5
# RetryInfo is for programs to read; this is what gRPC's own retry policy of a client goes by.
PUSHBACK = ("grpc-retry-pushback-ms", str(RETRY_SECONDS * 1000))

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

    def __init__(self, engine: Any, on_dead: Callable[[], Awaitable[None]], chat: ChatParams) -> None:
        self.engine = engine
        self.on_dead = on_dead
        self.chat = chat
        self.running: set[str] = set()
        self.uploads = UploadRoom()
        config = engine.model_config
        self.defaults = config.get_diff_sampling_param()
        # As vLLM's completions: a limit in a generation config that the user chose is a cap, else a default.
        chosen = config.generation_config not in ("auto", "vllm")
        override = config.override_generation_config.get("max_new_tokens")
        self.max_tokens_cap = self.defaults.get("max_tokens") if chosen else override

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: grpc.aio.ServicerContext) -> None:
        # A coroutine that writes, not a generator: cancelling it then closes the engine's generator, and with
        # it the request, at once, wherever it waits.
        await self._serve(request, context, context.write, progress=request.progress)

    async def GenerateUploadStream(
        self, parts: AsyncIterator[pb.GenerateUploadStreamRequest], context: grpc.aio.ServicerContext
    ) -> None:
        try:
            self._admit(1)
            with self.uploads.upload() as upload:
                request = await upload.receive(parts)
        except Exception as raised:
            await self._fail(raised, "head", context)

        async def write(event: pb.GenerateStreamResponse) -> None:
            await context.write(as_upload_event(event))

        await self._serve(request, context, write, progress=request.progress)

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        reply = Reply()

        async def add(event: pb.GenerateStreamResponse) -> None:
            reply.add(event)

        await self._serve(request, context, add)
        return reply.whole()

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        try:
            engine_input = await render(self.engine.renderer, request, self.chat, {}, any_length=True)
        except Exception as raised:
            await self._fail(raised, prompt_field(request), context)
        token_ids = engine_input["prompt_token_ids"]
        return pb.TokenizeResponse(
            token_ids=token_ids, count=len(token_ids), max_model_len=self.engine.model_config.max_model_len
        )

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetCapabilitiesResponse:
        return capabilities(self.engine, MAX_REQUEST_BYTES)

    async def _serve(
        self,
        request: GenerateRequest,
        context: grpc.aio.ServicerContext,
        send: Callable[[pb.GenerateStreamResponse], Awaitable[None]],
        progress: bool = False,
    ) -> None:
        """Send the events of a request; an error ends the call with its status."""
        call = Call(prompt_field(request))
        try:
            with self._claim(request.request_id) as request_id:
                stream = self._generate(request, request_id, call)
                if progress:
                    stream = with_progress(stream, watch_prefill(self.engine, request_id))
                async with aclosing(stream) as events:
                    async for event in events:
                        await send(event)
        except Exception as raised:
            await self._fail(root(raised), call.blamed, context)

    async def _generate(
        self, request: GenerateRequest, request_id: str, call: Call
    ) -> AsyncGenerator[pb.GenerateStreamResponse]:
        engine_input, params, plan = await self._prepare(request)
        lora = adapter(self.engine, request)
        # The prompt is fine by now: what the engine still refuses without a name is the form of the output.
        call.blamed = constraint_path(request.sampling) or call.blamed
        usages = [pb.Usage() for _ in range(params.n)]
        usages[0].prompt_tokens = plan["prompt_tokens"]
        outputs = self.engine.generate(engine_input, params, request_id, priority=request.priority, lora_request=lora)
        async with aclosing(outputs):
            async for result in outputs:
                if result.prompt_logprobs and not call.told_prompt:
                    call.told_prompt = True  # with n > 1 each choice comes with them
                    yield prompt_logprobs(result.prompt_token_ids, result.prompt_logprobs, params.prompt_logprobs)
                for output in result.outputs:
                    if output.finish_reason == "error":
                        raise self._generation_error(request, usages[output.index])
                    usages[output.index].completion_tokens += len(output.token_ids)
                    if output.text or output.token_ids:
                        for event in deltas(output, params.logprobs):
                            yield event
                if result.outputs and result.outputs[0].index == 0:
                    usages[0].cached_tokens = result.num_cached_tokens or 0
                for output in result.outputs:
                    if output.finish_reason is not None:
                        yield final(output, usages[output.index], plan)

    async def _prepare(self, request: GenerateRequest) -> tuple[Any, SamplingParams, dict[str, Any]]:
        """Engine input, sampling parameters and described plan of a request; raises for bad input."""
        self._admit(max(request.sampling.n, 1))
        star = star_args(request.star)
        self._refuse_without_effect(request)
        extras = {"cache_salt": request.cache_salt} if request.HasField("cache_salt") else {}
        validate_cache_salt(extras.get("cache_salt"))
        engine_input = await render(self.engine.renderer, request, self.chat, extras)
        num_tokens = len(engine_input["prompt_token_ids"])
        if not num_tokens:
            raise VLLMValidationError("The prompt has no tokens.", parameter=prompt_field(request))
        wanted = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else None
        max_tokens = get_max_tokens(
            self.engine.model_config.max_model_len, wanted, num_tokens, self.defaults, self.max_tokens_cap
        )
        if max_tokens < 1 and wanted != 0:
            room = f"The prompt of {num_tokens} tokens fills the model's context: there is no room for output."
            raise VLLMValidationError(room, parameter=prompt_field(request))
        params = sampling_params(request.sampling, self.defaults, max_tokens, star)
        resolver = star_requests(self.engine.input_processor)
        planned = resolver.plan(star, num_tokens, tokens_alone(engine_input))
        return engine_input, params, resolver.describe(planned)

    def _admit(self, choices: int) -> None:
        """Raises where the engine is dead, or too full for so many more."""
        if self.engine.errored:
            raise self.engine.dead_error
        self.engine.check_admission(choices)

    def _generation_error(self, request: GenerateRequest, used: pb.Usage) -> Exception:
        """What a choice that ended with an error says: the engine gives no reason.

        A constraint that passed vLLM's checks, but that no grammar could be made of, ends so before the first token.
        """
        if constraint_path(request.sampling) and not used.completion_tokens:
            return VLLMValidationError("The engine could not make a grammar of this constraint; its log says why.")
        return GenerationError()

    def _refuse_without_effect(self, request: GenerateRequest) -> None:
        """Refuse what vLLM would take and then pass over."""
        if request.priority and self.engine.vllm_config.scheduler_config.policy != "priority":
            reason = "the server does not run with --scheduling-policy priority: only 0 has a meaning"
            raise VLLMValidationError(f"priority={request.priority} is refused: {reason}", parameter="priority")
        if self.engine.renderer.tokenizer is None:
            for field in set(TEXT_FIELDS) & set(given(request.sampling)):
                reason = "the server runs with --skip-tokenizer-init and knows tokens only"
                raise VLLMValidationError(f"{field} is refused: {reason}", parameter=field)

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

    async def _fail(self, error: Exception, blamed: str, context: grpc.aio.ServicerContext) -> NoReturn:
        code = grpc_code(error)
        if code is grpc.StatusCode.INTERNAL:
            logger.error("a gRPC request failed", exc_info=error)
        if isinstance(error, EngineDeadError):
            await self.on_dead()
        status = rpc_status.to_status(error_status(error, code, blamed))
        metadata = status.trailing_metadata
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            metadata = (*metadata, PUSHBACK)
        await context.abort(status.code, status.details, metadata)
        raise AssertionError("abort has raised")


@dataclass
class Call:
    """What is known of a call so far: the field an error without a name is about, and what has been told."""

    blamed: str
    told_prompt: bool = False


def adapter(engine: Any, request: GenerateRequest) -> Any:
    """The LoRA adapter that a request asks for; None: the base model (raises VLLMValidationError)."""
    if not request.HasField("lora_name"):
        return None
    loaded = compat.lora_adapters(engine)
    if request.lora_name not in loaded:
        has = f"it has {', '.join(sorted(loaded))}" if loaded else "it has none (--enable-lora, --lora-modules)"
        reason = f"lora_name={request.lora_name!r} is refused: the server has no such adapter; {has}"
        raise VLLMValidationError(reason, parameter="lora_name")
    return loaded[request.lora_name]


class Front:
    """The gRPC server with its health and reflection services, and AdminService's own port where it has one."""

    def __init__(
        self, engine: Any, api_keys: list[str], chat: ChatParams | None = None, admin: AdminOptions = NO_ADMIN
    ) -> None:
        self.admin = admin
        self.admin_server: grpc.aio.Server | None = None
        self.admin_port: int | None = None
        self.gate = Gate(api_keys)
        self.server = grpc.aio.server(interceptors=[self.gate, Reader()], options=SERVER_OPTIONS)
        self.health = health.aio.HealthServicer()
        self.inference = Inference(engine, self.health.enter_graceful_shutdown, chat or ChatParams())
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.inference, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin_servicer(engine, own_port=False), self.server)
        self.own_port_servicer = self._admin_servicer(engine, own_port=True)
        names = (SERVICE, grpc_admin.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        self.engine = engine
        self.engine_died = False
        self.port: int | None = None
        self._watchdog: asyncio.Task | None = None
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
            self.admin_server, self.admin_port = await grpc_admin.start_own_port(
                self.own_port_servicer, f"{authority(self.admin.host)}:{self.admin.port}", credentials, SERVER_OPTIONS
            )
            logger.info("AdminService on %s:%d", authority(self.admin.host), self.admin_port)
        for name in ("", SERVICE):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._watchdog = asyncio.ensure_future(self._watch_engine())
        self.port = port
        return port

    async def _watch_engine(self) -> None:
        """Report NOT_SERVING when the engine dies, also while nobody calls."""
        while not self.engine.errored:
            await asyncio.sleep(WATCH_SECONDS)
        logger.error("gRPC: the engine has died; every call gets UNAVAILABLE")
        await self.health.enter_graceful_shutdown()

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """NOT_SERVING, refuse new calls, let running ones end within ``grace`` seconds, then close."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(grace))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace: float) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        self.engine_died = self.engine.errored
        await self.stop_admitting()
        if await self.gate.drain(grace):
            logger.info("gRPC: every running stream has ended")
        else:
            logger.warning("gRPC: ending streams that still run after %.0f s", grace)
        await self.server.stop(None)
        if self.admin_server is not None:
            await self.admin_server.stop(None)
