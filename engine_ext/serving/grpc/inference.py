"""The service starling.v1.InferenceService on the engine that the OpenAI server uses."""

from __future__ import annotations

import asyncio
import copy
import importlib.metadata
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import grpc
from vllm import envs
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.inputs import TextPrompt
from vllm.renderers import ChatParams, TokenizeParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from starling.attention_backends.star.refusals import has_library
from starling.config.warm_prompts import NO_LIBRARY
from starling.engine_ext.front.bounds import check_request
from starling.engine_ext.front.call import note_star
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.observability import headers_of_call
from starling.engine_ext.front.requests import shown_plan
from starling.engine_ext.serving.grpc.admin import star_message
from starling.engine_ext.serving.grpc.arrivals import ClientOf
from starling.engine_ext.serving.grpc.messages import (
    DuplicateRequestError,
    TokenizeMemoryError,
    abort,
    given,
    root_cause,
    star_args,
)
from starling.engine_ext.serving.grpc.outputs import deltas, final, prompt_logprobs, with_progress
from starling.engine_ext.serving.grpc.prompt_inputs import (
    GenerateRequest,
    PromptLimit,
    chat_tok_params,
    prompt_field,
    prompt_limit,
    prompt_of,
    render,
    render_chat,
)
from starling.engine_ext.serving.grpc.sampling import TEXT_FIELDS, constraint_path, sampling_params
from starling.engine_ext.serving.grpc.server_options import MAX_REQUEST_BYTES
from starling.engine_ext.serving.grpc.upload import Quota, Upload, as_upload_event, upload_quota
from starling.engine_ext.serving.grpc.warming import Warming
from starling.features.front_request import TRACE_HEADERS
from starling.reply import Reply
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc
from starling.vllm_compat.versions import vllm_version


class Tokenizing:
    """Tokenizer of one request after the other.

    Args:
        renderer: the engine's renderer.
        chat: parameters for rendering chat messages.
        limit: the longest prompt.
    """

    def __init__(self, renderer: Any, chat: ChatParams, limit: PromptLimit) -> None:
        self.renderer = renderer
        self.chat = chat
        self.limit = limit
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="starling-tokenize")
        # A copy: a tokenizer can't work in two threads. Now, since a tokenizer can't work while it is copied.
        self.tokenizer = copy.deepcopy(renderer.tokenizer)
        self.quota = Quota(2 * MAX_REQUEST_BYTES, MAX_REQUEST_BYTES, TokenizeMemoryError)

    async def token_ids(self, request: pb.TokenizeRequest, client: str) -> list[int]:
        """Return the token ids of a request's prompt, even if it is somewhat longer than the model's context.

        Args:
            request: the client's request.
            client: name of the client, for its share of the waiting requests.

        Raises:
            VLLMValidationError, ValueError: the prompt is empty, or has more characters than any prompt of the model;
                or the messages can't be rendered.
            TokenizeMemoryError: other requests wait.
        """
        with self.quota.room(client) as room:
            room.take(request.ByteSize())
            params = self.renderer.default_cmpl_tok_params
            if request.WhichOneof("prompt") == "chat":
                self.limit.check_chat(request.chat)
                params = chat_tok_params(self.renderer)
                prompt = await render_chat(self.renderer, request.chat, self.chat)
                if "prompt_token_ids" in prompt:  # some models' templates make tokens
                    return list(prompt["prompt_token_ids"])
            else:
                prompt = prompt_of(request)
                self.limit.check_characters(len(prompt["prompt"]))
            self.renderer.get_tokenizer()  # refuses where there is none
            params = replace(params, max_total_tokens=None)
            return await self._in_turn(prompt, params)

    async def _in_turn(self, prompt: TextPrompt, params: TokenizeParams) -> list[int]:
        """Tokenise on the thread. A cancelled call ends only with its turn, as its text is in memory until then."""
        working = asyncio.get_running_loop().run_in_executor(self.thread, self._tokenize, prompt, params)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait({working})
            raise

    def _tokenize(self, prompt: TextPrompt, params: TokenizeParams) -> list[int]:
        text = params.apply_pre_tokenization(self.tokenizer, prompt)["prompt"]
        return list(self.tokenizer(text, **params.get_encode_kwargs())["input_ids"])


SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """InferenceService: translates calls to engine requests, and the engine's outputs to responses.

    Args:
        engine: the AsyncLLM that the OpenAI server uses.
        on_dead: called when a call finds the engine dead.
        chat: parameters for rendering chat messages.
        client_of: returns a name for the client of a call.
    """

    def __init__(
        self, engine: Any, on_dead: Callable[[], Awaitable[None]], chat: ChatParams, client_of: ClientOf
    ) -> None:
        self.engine = engine
        self.on_dead = on_dead
        self.chat = chat
        self.client_of = client_of
        self.running: set[str] = set()
        self.limit = prompt_limit(engine)
        self.uploads = upload_quota(self.limit.tokens)
        self.tokenizing = Tokenizing(engine.renderer, chat, self.limit)
        self.warming = Warming(self.limit, str(front_state(engine).planner.defaults.segments), self._warm)
        config = engine.model_config
        self.defaults = config.get_diff_sampling_param()
        # As in vLLM's completions: max_tokens of a generation config that the user chose is a cap, else a default.
        chosen = config.generation_config not in ("auto", "vllm")
        override = config.override_generation_config.get("max_new_tokens")
        self.max_tokens_cap = self.defaults.get("max_tokens") if chosen else override

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: grpc.aio.ServicerContext) -> None:
        # A coroutine that writes, not a generator: its cancellation closes the engine's generator, which ends the
        # request, at once, whatever it waits for.
        await self._serve(request, context, context.write, progress=request.progress)

    async def GenerateUploadStream(
        self, parts: AsyncIterator[pb.GenerateUploadStreamRequest], context: grpc.aio.ServicerContext
    ) -> None:
        async def write(event: pb.GenerateStreamResponse) -> None:
            await context.write(as_upload_event(event))

        with ExitStack() as held:
            try:
                self.check_admission(1)
                room = held.enter_context(self.uploads.room(self.client_of(context)))
                request = await Upload(room, self.limit).receive(parts)
            except Exception as raised:
                await self.end_call(raised, "head", context)
            await self._serve(request, context, write, progress=request.progress, on_prepared=held.close)

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        reply = Reply()

        async def add(event: pb.GenerateStreamResponse) -> None:
            reply.add(event)

        await self._serve(request, context, add)
        return reply.response()

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        try:
            token_ids = await self.tokenizing.token_ids(request, self.client_of(context))
        except Exception as raised:
            await self.end_call(raised, prompt_field(request), context)
        return pb.TokenizeResponse(
            token_ids=token_ids, count=len(token_ids), max_model_len=self.engine.model_config.max_model_len
        )

    async def WarmDocuments(self, request: pb.WarmDocumentsRequest, context: grpc.aio.ServicerContext) -> None:
        try:
            self._check_documents()
            await self.warming.run(request, context.write)
        except Exception as raised:
            await self.end_call(root_cause(raised), "documents", context)

    def _warm(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateStreamResponse]:
        """Run the request of a document."""
        return self._generate(request, f"grpc-warm-{uuid.uuid4().hex}", Call("documents", lambda: None))

    def _check_documents(self) -> None:
        """Check that the engine runs prompts of documents, and keeps them (raises VLLMValidationError)."""
        refusals = front_state(self.engine).planner.facts.refusals
        if not refusals and not has_library(self.engine.vllm_config):
            refusals = (NO_LIBRARY,)
        if refusals:
            raise VLLMValidationError(f"WarmDocuments is refused: {'; '.join(refusals)}", parameter="documents")

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetCapabilitiesResponse:
        return capabilities(self.engine, self.uploads.total)

    async def _serve(
        self,
        request: GenerateRequest,
        context: grpc.aio.ServicerContext,
        send: Callable[[pb.GenerateStreamResponse], Awaitable[None]],
        progress: bool = False,
        on_prepared: Callable[[], None] = lambda: None,
    ) -> None:
        """Send the events of a request; an error ends the call with its status.

        Args:
            request: the client's request.
            context: context of the call.
            send: sends one event.
            progress: whether to send the prompt's progress too.
            on_prepared: called once the prompt is tokenised.
        """
        metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        call = Call(prompt_field(request), on_prepared, trace_headers=headers_of_call(self.engine, metadata))
        try:
            check_request(request, self.limit.tokens)
            with self._unique_id(request.request_id) as request_id:
                stream = self._generate(request, request_id, call)
                if progress:
                    stream = with_progress(stream, front_state(self.engine).poller.watch(self.engine, request_id))
                async with aclosing(stream) as events:
                    async for event in events:
                        await send(event)
        except Exception as raised:
            await self.end_call(root_cause(raised), call.error_field, context)

    async def _generate(
        self, request: GenerateRequest, request_id: str, call: Call
    ) -> AsyncGenerator[pb.GenerateStreamResponse]:
        engine_input, params, plan = await self._prepare(request)
        call.on_prepared()
        lora = lora_adapter(self.engine, request)
        # The prompt is valid: an error of the engine that names no field is about the output's constraint.
        call.error_field = constraint_path(request.sampling) or call.error_field
        usages = [pb.Usage() for _ in range(params.n)]
        usages[0].prompt_tokens = plan["prompt_tokens"]
        keywords = {
            "priority": request.priority,
            "lora_request": lora,
            TRACE_HEADERS: call.trace_headers,
        }
        if request.session_id:
            keywords["session_id"] = request.session_id
        outputs = self.engine.generate(engine_input, params, request_id, **keywords)
        async with aclosing(outputs):
            async for result in outputs:
                if result.prompt_logprobs and not call.sent_prompt_logprobs:
                    call.sent_prompt_logprobs = True  # with n > 1 each choice has them
                    yield prompt_logprobs(result.prompt_token_ids, result.prompt_logprobs, params.prompt_logprobs)
                for output in result.outputs:
                    if output.finish_reason == "error":
                        raise GenerationError()  # the engine gives no reason
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
        """Return the engine input with its Decision, the sampling parameters, and the plan as a response shows it.

        Raises:
            VLLMValidationError, ValueError: the input is bad.
            Exception: the engine can't take the request, see ``check_admission``.
        """
        self.check_admission(max(request.sampling.n, 1))
        star = star_args(request.star)
        note_star(star)
        self._refuse_without_effect(request)
        wanted = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else None
        context = self.engine.model_config.max_model_len
        if wanted is not None and wanted > context:  # as over HTTP
            reason = f"the model's context has {context} tokens, those of the prompt included"
            message = f"max_tokens={wanted} is refused: {reason}. Allowed: up to {context}."
            raise VLLMValidationError(message, parameter="max_tokens")
        extras = {"cache_salt": request.cache_salt} if request.HasField("cache_salt") else {}
        validate_cache_salt(extras.get("cache_salt"))
        engine_input = await render(self.engine.renderer, request, self.chat, extras, self.limit)
        num_tokens = len(engine_input["prompt_token_ids"])
        if not num_tokens:
            raise VLLMValidationError("The prompt has no tokens.", parameter=prompt_field(request))
        max_tokens = get_max_tokens(context, wanted, num_tokens, self.defaults, self.max_tokens_cap)
        if max_tokens < 1 and wanted != 0:
            reason = f"The prompt of {num_tokens} tokens fills the model's context, and leaves no token for output."
            raise VLLMValidationError(reason, parameter=prompt_field(request))
        params = sampling_params(request.sampling, self.defaults, max_tokens, star)
        planner = front_state(self.engine).planner
        engine_input = planner.prepare(engine_input, params, has_lora=request.HasField("lora_name"))
        shown = shown_plan(engine_input)
        assert shown is not None  # a server with a gRPC port has Starling on
        return engine_input, params, shown

    def check_admission(self, choices: int) -> None:
        """Check that the engine can take ``choices`` more requests.

        Raises:
            EngineDeadError: the engine is dead.
            Exception: an error of vLLM if the queue is full, or DrainingError after a drain.
        """
        if self.engine.errored:
            raise self.engine.dead_error
        self.engine.check_admission(choices)

    def _refuse_without_effect(self, request: GenerateRequest) -> None:
        """Refuse fields that vLLM would accept and ignore (raises VLLMValidationError)."""
        if request.priority and self.engine.vllm_config.scheduler_config.policy != "priority":
            reason = "the server does not run with --scheduling-policy priority, so a priority has no effect"
            raise VLLMValidationError(f"priority={request.priority} is refused: {reason}", parameter="priority")
        if self.engine.renderer.tokenizer is None:
            for field in set(TEXT_FIELDS) & set(given(request.sampling)):
                reason = "the server runs with --skip-tokenizer-init and has no tokenizer"
                raise VLLMValidationError(f"{field} is refused: {reason}", parameter=field)

    @contextmanager
    def _unique_id(self, client_id: str) -> Iterator[str]:
        """Reserve a request's id until it ends, and yield the engine's id; the engine itself would accept duplicates.

        Raises:
            DuplicateRequestError: a request of that id is running.
        """
        if client_id in self.running:
            raise DuplicateRequestError(f"request_id {client_id!r} is running; wait for its end or choose another")
        name = client_id or uuid.uuid4().hex
        self.running.add(name)
        try:
            yield f"grpc-{name}"
        finally:
            self.running.discard(name)

    async def end_call(self, error: Exception, field: str, context: grpc.aio.ServicerContext) -> NoReturn:
        """End a call with the error's status; ``field`` is the request's field for errors that name none."""
        if isinstance(error, EngineDeadError):
            await self.on_dead()
        await abort(context, error, field)


@dataclass
class Call:
    """State of a call of Inference.

    Attributes:
        error_field: the request's field for errors that name none.
        on_prepared: called once the prompt is tokenised.
        sent_prompt_logprobs: whether the prompt's log probabilities have been sent.
        trace_headers: headers that make the client's span the parent of the request's span, or None if there are none.
    """

    error_field: str
    on_prepared: Callable[[], None]
    sent_prompt_logprobs: bool = False
    trace_headers: Mapping[str, str] | None = None


def lora_adapter(engine: Any, request: GenerateRequest) -> Any:
    """Return the LoRA adapter (vLLM's LoRARequest) that a request names, or None for the base model.

    Raises:
        VLLMValidationError: the server has no adapter of that name.
    """
    if not request.HasField("lora_name"):
        return None
    loaded = front_state(engine).lora_adapters()
    if request.lora_name not in loaded:
        has = f"it has {', '.join(sorted(loaded))}" if loaded else "it has none (--enable-lora, --lora-modules)"
        reason = f"lora_name={request.lora_name!r} is refused: the server has no such adapter; {has}"
        raise VLLMValidationError(reason, parameter="lora_name")
    return loaded[request.lora_name]


def capabilities(engine: Any, max_upload_bytes: int) -> pb.GetCapabilitiesResponse:
    """Return the capabilities from the engine's configuration, without a call to the engine.

    Args:
        engine: the AsyncLLM of the server.
        max_upload_bytes: bytes of memory for prompts that are being uploaded.
    """
    model, state = engine.model_config, front_state(engine)
    planner = state.planner
    names = model.served_model_name
    return pb.GetCapabilitiesResponse(
        models=[names] if isinstance(names, str) else names,
        max_model_len=model.max_model_len,
        vocabulary_size=model.get_vocab_size(),
        kv_page_tokens=planner.page_size,
        star_available=not planner.facts.refusals,
        star_refusals=planner.facts.refusals,
        star_defaults=star_message(planner.defaults) if planner.config else None,
        max_request_bytes=MAX_REQUEST_BYTES,
        max_response_bytes=0,  # no limit: gRPC limits only the messages that it receives
        max_n=envs.VLLM_MAX_N_SEQUENCES,
        max_logprobs=model.max_logprobs,
        lora_names=sorted(state.lora_adapters()),
        starling_version=importlib.metadata.version("vllm-starling"),
        vllm_version=vllm_version(),
        max_upload_bytes=max_upload_bytes,
    )
