"""The engine as an API server sees it: the rendering of chats, AsyncLLM, its processors, and calls to engine cores."""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from starling.vllm_compat.admission_limits import has_arrived, hide_requests
from starling.vllm_compat.patching import Original, touches, wrap

ENGINE_SECONDS = 3.0
"""Seconds that an engine has at least to abort its requests and remove its files when it shuts down."""

IS_BEAM = "starling_is_beam"
"""The key of an engine input that is a beam of a beam search."""


def on_processed_request(callback: Callable[[Any, Any, Any], None]) -> None:
    """Call ``callback(input_processor, engine_core_request, prompt)`` for every request of every front.

    ``prompt`` is what the request was made of; a beam has the key IS_BEAM. The request holds its own copy of the
    sampling parameters; platform.validate_request, which sees the prompt too, is handed the caller's, which several
    prompts may share. Goes when vLLM lets a plugin amend a processed request.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    @wrap(InputProcessor, "process_inputs")
    def process_inputs(original: Original, self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, request_id, prompt, *args, **kwargs)
        callback(self, request, prompt)
        return request

    mark_beams()


@touches("vllm.v1.engine.output_processor.OutputProcessor.external_req_ids")
def abort_unsent_requests() -> None:
    """Abort each request that a front has noted and could not send to its engine core.

    vLLM notes a request before it encodes and sends it. Where that fails, as for an integer above 64 bits, the request
    counts against --max-num-queued-reqs for good, and an offline engine waits for it. Goes when vLLM aborts it, as it
    does for requests of several choices.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    @wrap(AsyncLLM, "_add_request")
    async def _add_request(original: Original, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        try:
            await original(self, request, *args, **kwargs)
        except BaseException:
            if self.output_processor.has_request(request.request_id):
                await self.abort(request.request_id, internal=True)
            raise

    @wrap(LLMEngine, "add_request")
    def add_request(original: Original, self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        known = set(self.output_processor.external_req_ids.get(request_id, ()))
        try:
            return original(self, request_id, *args, **kwargs)
        except BaseException:
            new = set(self.output_processor.external_req_ids.get(request_id, ())) - known
            self.abort_request(sorted(new), internal=True)
            raise


def mark_beams() -> None:
    """Give the prompt of each beam the key IS_BEAM, in servers and in offline engines.

    Beam search makes a new prompt of each beam and token, which can't be distinguished from a client's prompt.
    Goes when vLLM says so of the prompt or its sampling parameters.
    """
    from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence

    @wrap(BeamSearchSequence, "get_prompt")
    def get_prompt(original: Original, self: Any) -> Any:
        return {**original(self), IS_BEAM: True}


def on_generate(
    prepare: Callable[..., Any],
    around_outputs: Callable[..., Any],
) -> None:
    """Let ``prepare(input_processor, prompt, sampling_params, request_id, has_lora=...)`` check and replace a prompt.

    ``has_lora`` says whether the request names a LoRA adapter. ``prepare`` is called before a response has started.
    ``request_id`` is the one that the engine is about to get; None where it does not have one yet. The engine's outputs
    then come from
    ``around_outputs(engine, generate, prompt, sampling_params, request_id, keywords)``.

    AsyncLLM.generate is an async generator: its body, and with it every check, runs after a streamed
    response's 200 has gone out. OpenAIServingResponses puts a second generator around it. Goes when vLLM
    validates streamed requests before it answers.
    """
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    @wrap(AsyncLLM, "generate")
    def generate(
        original: Original, self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> Any:
        has_lora = kwargs.get("lora_request") is not None
        prompt = prepare(self.input_processor, prompt, sampling_params, request_id, has_lora=has_lora)
        outputs = functools.partial(original, self)
        return around_outputs(self, outputs, prompt, sampling_params, request_id, kwargs)

    @wrap(OpenAIServingResponses, "_generate_with_builtin_tools")
    def _generate_with_builtin_tools(
        original: Original,
        self: Any,
        request_id: str,
        engine_input: Any,
        sampling_params: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        processor = getattr(self.engine_client, "input_processor", None)
        if processor is not None:
            has_lora = kwargs.get("lora_request") is not None
            engine_input = prepare(processor, engine_input, sampling_params, None, has_lora=has_lora)
        return original(self, request_id, engine_input, sampling_params, *args, **kwargs)


def is_hooked() -> bool:
    """Return whether requests of this process's fronts pass ``on_processed_request`` and ``on_generate``."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    return all(hasattr(function, "__starling__") for function in (AsyncLLM.generate, InputProcessor.process_inputs))


def on_encode(prepare: Callable[[Any, Any], Any]) -> None:
    """Let ``prepare(input_processor, prompt)`` check and replace the prompt of every pooling request of an AsyncLLM.

    Goes as on_generate does.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    @wrap(AsyncLLM, "encode")
    def encode(original: Original, self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, prepare(self.input_processor, prompt), *args, **kwargs)


def on_openai_request(check: Callable[[Any], None], check_unknown: Callable[[dict[str, Any]], None]) -> None:
    """Call ``check(http_request)`` for the requests of an OpenAI server, before their prompts are rendered.

    Whatever a request is for, vLLM first asks whether the server has its model; only pooling requests are asked about
    elsewhere. vLLM ignores unknown fields of a request's JSON, and its renderer and its BeamSearchParams get nothing of
    `vllm_xargs`. Its model of an Anthropic request drops unknown fields: ``check_unknown`` gets them. And its path of
    these requests logs an error of the client with its stack: here it is an answer before that. Goes when vLLM refuses
    unknown fields, hands a request on to its renderer and its beam search, and logs no error of a client.
    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.exceptions import VLLMClientError

    @wrap(BaseServing, "_check_model")
    async def _check_model(original: Original, self: Any, request: Any) -> Any:
        refusal = await original(self, request)
        if refusal is None:
            check(request)
        return refusal

    @wrap(AnthropicServingMessages, "create_messages")
    async def create_messages(original: Original, self: Any, request: Any, raw_request: Any = None) -> Any:
        try:
            sent = {} if raw_request is None else await raw_request.json()
            check_unknown({name: value for name, value in sent.items() if name not in type(request).model_fields})
            return await original(self, request, raw_request)
        except VLLMClientError as error:
            return self.create_error_response(error)


def on_beam_search(callback: Callable[[], None]) -> None:
    """Call ``callback()`` before a server searches beams of a prompt: once for each prompt of a request.

    Goes when beams are distinguished from prompts of clients (``mark_beams``).
    """
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    @wrap(BeamSearchOnlineMixin, "beam_search")
    def beam_search(original: Original, self: Any, *args: Any, **kwargs: Any) -> Any:
        callback()
        return original(self, *args, **kwargs)


@touches("vllm.entrypoints.serve.engine.protocol.ErrorInfo.{message, param}")
def on_error_text(explain: Callable[[str, str | None], str], shorten: Callable[[str], str]) -> None:
    """Put ``explain(message, parameter)`` for the message of every error of the HTTP server, and bound both.

    vLLM's messages quote what a client sent, of any length, and name pydantic's types. Both are handed to ``shorten``.
    Goes when vLLM bounds them, and says in words what a value of `vllm_xargs` may be.
    """
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo

    if "__init__" in vars(ErrorInfo):  # done already: vLLM's class has only pydantic's
        return
    original = ErrorInfo.__init__

    def __init__(self: Any, /, **fields: Any) -> None:
        fields["message"] = explain(fields["message"], fields.get("param"))
        original(self, **fields | {name: shorten(fields[name]) for name in ("message", "param") if fields.get(name)})

    ErrorInfo.__init__ = __init__  # type: ignore[assignment, method-assign]


@touches("vllm.v1.engine.output_processor.RequestState.{make_request_output, parent_req}")
def on_request_output(plan_of: Callable[[Any], Any], sources_key: str, note: Callable[[Any], None]) -> None:
    """Give each RequestOutput the attributes ``plan`` and ``document_sources``.

    ``note(engine_core_request)`` is called for each request, which has the engine's own id by then. The plan is what
    ``plan_of(engine_core_request)`` returned. The sources are what an engine core has put under ``sources_key`` into
    the kv_transfer_params of the request's first output, or None if it has put nothing there; clients see only the
    other keys.

    vLLM makes a request's outputs of its RequestState, which keeps nothing of the sampling parameters' extra_args. Goes
    when a RequestOutput has a place for what a plugin knows of its request.
    """
    from vllm.v1.engine.output_processor import RequestState

    @wrap(RequestState, "from_new_request")
    def from_new_request(original: Original, cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(cls, tokenizer, request, *args, **kwargs)
        note(request)
        parent = state.parent_req  # the samples of n > 1 have one plan, which is described once
        plan = getattr(parent, "star_plan", None)
        if plan is None:
            plan = plan_of(request)
            if parent is not None:
                parent.star_plan = plan
        state.star_plan, state.star_sources = plan, None
        return state

    @wrap(RequestState, "make_request_output")
    def make_request_output(
        original: Original,
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if kv_transfer_params and sources_key in kv_transfer_params:
            self.star_sources = kv_transfer_params[sources_key]
            others = {key: value for key, value in kv_transfer_params.items() if key != sources_key}
            kv_transfer_params = others or None
        output = original(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params, *args, **kwargs
        )
        if output is not None:
            output.plan, output.document_sources = self.star_plan, self.star_sources
        return output


DEATH_CHECK_SECONDS = 1.0
SHUTTING_DOWN = "Server shutting down"


@touches("vllm.v1.engine.core_client.MPClient.core_engines")
def num_engine_cores(engine: Any) -> int:
    """Return the number of engine cores that an AsyncLLM calls: one for each data-parallel engine."""
    return len(engine.engine_core.core_engines)


@touches(
    "vllm.v1.engine.core_client.AsyncMPClient._call_utility_async",
    "vllm.v1.engine.core_client.MPClient.core_engines",
)
async def call_engine_core(engine: Any, rank: int, name: str, *args: Any) -> Any:
    """Call a utility in one engine core of an AsyncLLM; returns its result, however late it is.

    Where there are several engines ``call_utility_async`` returns the first one's result only, and
    ``call_utility_all_async`` waits for all of them. A call to an engine that dies is never answered, hence the look at
    its health while waiting. Goes when AsyncLLM has a public way to utilities of one engine that ends with it.

    Raises:
        EngineDeadError: the engine is dead, or dies meanwhile.
        RetryableRequestError: it is shutting down.
        Exception: the utility failed; vLLM gives its message, not its type.
    """
    from vllm.exceptions import RetryableRequestError

    if engine.errored:
        raise engine.dead_error
    client = engine.engine_core
    call = asyncio.ensure_future(client._call_utility_async(name, *args, engine=client.core_engines[rank]))
    try:
        while not (await asyncio.wait({call}, timeout=DEATH_CHECK_SECONDS))[0]:
            if engine.errored:
                raise engine.dead_error
        return call.result()
    except Exception as error:
        if str(error) == SHUTTING_DOWN:
            raise RetryableRequestError("the server is shutting down") from None
        raise
    finally:
        call.cancel()


@touches(
    "vllm.v1.engine.input_processor.InputProcessor.assign_request_id",
    "vllm.v1.engine.async_llm.AsyncLLM.{_run_output_handler, abort}",
    "vllm.v1.engine.output_processor.OutputProcessor.add_request",
    "vllm.v1.engine.output_processor.RequestOutputCollector.get",
    "vllm.v1.engine.core_client.EngineCoreClient.add_request_async",
)
async def run_internal_request(engine: Any, request: Any, internal_ids: set[str]) -> Any:
    """Run a processed request of Starling's own to its end; returns its RequestOutput.

    The engine knows it by the id that its maker gave it, so aborts of that id, and calls that ask for the engine's
    requests of that id, reach it. Admission limits and request statistics leave it out. Where this call is cancelled
    or fails, the request is aborted. Goes when vLLM has requests of its own making.

    Args:
        internal_ids: the engine's ids of all such requests of this engine; the request's is in it while it runs.
    """
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    hide_requests(engine.output_processor, internal_ids)
    engine.input_processor.assign_request_id(request)
    if request.request_id == request.external_req_id:  # VLLM_DISABLE_REQUEST_ID_RANDOMIZATION: all parts would have it
        request.request_id = f"{request.external_req_id}-{uuid.uuid4().hex[:8]}"
    engine._run_output_handler()
    queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, request.request_id)
    internal_ids.add(request.request_id)
    try:
        engine.output_processor.add_request(request, None, None, 0, queue)
        try:
            await engine.engine_core.add_request_async(request)
            return await queue.get()
        except (Exception, asyncio.CancelledError):
            await engine.abort(request.request_id, internal=True)
            raise
    finally:
        queue.close()
        internal_ids.discard(request.request_id)


@touches("vllm.v1.engine.async_llm.AsyncLLM.check_admission")
def refuse_admission(engine: Any, make_error: Callable[[], Exception]) -> None:
    """Let every front of an AsyncLLM refuse new requests; those admitted go on.

    vLLM calls ``check_admission`` before a response starts, and again when the engine gets the request. Goes
    when vLLM's server can drain while it runs.

    Args:
        make_error: makes the exception of each refusal. One exception for all would keep the frames of every request.
    """

    def check_admission(n: int = 1, request_id: str | None = None) -> None:
        if not has_arrived(engine, request_id):
            raise make_error()

    engine.check_admission = check_admission


def on_abort(callback: Callable[[Any, list[str]], None]) -> None:
    """Call ``callback(engine, request_ids)`` before requests are aborted by the ids that a front gave them.

    A front can abort so a request that the engine does not know yet. And an abort that has begun reaches the engine
    core: vLLM forgets the request at once, so where the caller is cancelled while it sends the abort (an anyio task
    group cancels its tasks again and again), nothing would end the request in the engine core. Goes when vLLM has
    requests of several parts, and shields its aborts.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    @wrap(AsyncLLM, "abort")
    async def abort(original: Original, self: Any, request_id: Any, internal: bool = False) -> None:
        if not internal:
            callback(self, [request_id] if isinstance(request_id, str) else list(request_id))
        await asyncio.shield(asyncio.ensure_future(original(self, request_id, internal)))


@touches("vllm.v1.engine.core_client.EngineCoreClient.abort_requests_async")
async def abort_in_engine_cores(engine: Any, engine_request_ids: list[str]) -> None:
    """Abort requests that the front knows no more.

    AsyncLLM hands the choices of n > 1 over one after the other, and an abort meanwhile misses those that an engine
    core does not have yet. Goes when vLLM's abort waits for them.

    Args:
        engine_request_ids: the engine's own; unknown ones, and those of ended requests, do nothing.
    """
    await engine.engine_core.abort_requests_async(engine_request_ids)


@touches(
    "vllm.v1.engine.async_llm.AsyncLLM.{engine_core, output_handler, shutdown}",
    "vllm.v1.engine.core_client.BackgroundResources.engine_manager",
    "vllm.v1.engine.core_client.MPClient.resources",
    "vllm.v1.engine.utils.CoreEngineProcManager.shutdown",
    "vllm.utils.async_utils.cancel_task_threadsafe",
)
def around_shutdown(
    engine: Any, before: Callable[[float | None], None], after: Callable[[], None] | None = None
) -> None:
    """Call ``before(timeout)`` before an AsyncLLM shuts down, and ``after()`` once its processes have ended.

    On a signal vLLM's serve_http stops the engine before the server; it does so in a thread. The engine has what
    ``before`` leaves of its timeout, and ENGINE_SECONDS at least: with a timeout of 0, vLLM kills its processes in the
    moment in which it tells them to abort their requests.

    ``after`` is called before vLLM closes the engine's sockets. Whoever still reads from them would get an
    EngineDeadError, and log it with its stack: so nobody reads any more then. Goes when serve_http takes hooks, and
    leaves that time.

    Args:
        before: function called with the seconds in which the engine shuts down, or None for vLLM's default.
    """
    from vllm.utils.async_utils import cancel_task_threadsafe  # an engine may end when nothing can be imported any more

    shut_down = engine.shutdown

    def shutdown(timeout: float | None = None) -> None:
        began = time.monotonic()
        before(timeout)
        left = None if timeout is None else max(ENGINE_SECONDS, timeout - (time.monotonic() - began))
        watched = nullcontext() if after is None else _calls_after_processes(engine, cancel_task_threadsafe, after)
        with watched:
            shut_down(timeout=left)

    engine.shutdown = shutdown


@contextmanager
def _calls_after_processes(
    engine: Any, stop_reading: Callable[[Any], None], after: Callable[[], None]
) -> Iterator[None]:
    """Stop reading the outputs of ``engine``, and call ``after()``, once its processes, or its client, have ended.

    At the end of the block at the latest: of an engine that has died, nobody ends the processes any more.

    Args:
        stop_reading: called with the task that reads them.
    """
    client = engine.engine_core
    owner = client.resources.engine_manager or client  # one of several API servers has no processes of its own
    stop, is_told = owner.shutdown, False

    def tell() -> None:
        nonlocal is_told
        if not is_told:
            is_told = True
            stop_reading(engine.output_handler)
            after()

    def stop_and_tell(*args: Any, **kwargs: Any) -> None:
        try:
            stop(*args, **kwargs)
        finally:
            tell()

    owner.shutdown = stop_and_tell
    try:
        yield
    finally:
        owner.shutdown = stop
        tell()


@touches("vllm.v1.engine.output_processor.OutputProcessor.external_req_ids")
def engine_request_ids(engine: Any, request_id: str) -> list[str]:
    """Return the engine's own ids of what a front calls ``request_id``: one, one per choice, or none if it is unknown.

    vLLM adds random characters to a front's id, and splits n > 1 into a request per choice. Goes with a
    public look-up.
    """
    return list(engine.output_processor.external_req_ids.get(request_id, ()))


@touches("vllm.v1.engine.output_processor.OutputProcessor.request_states")
def unfinished_ids(engine: Any) -> tuple[list[str], list[str]]:
    """Return (ids that fronts gave, the engine's own) of all requests of an AsyncLLM. Goes with a public list."""
    return list(engine.output_processor.external_req_ids), list(engine.output_processor.request_states)


@touches("vllm.v1.engine.output_processor.OutputProcessor.request_states")
def request_state(engine: Any, engine_request_id: str) -> Any | None:
    """Return vLLM's state of a request in the front: ``external_req_id``, ``is_prefilling``, ``num_cached_tokens``.

    The result is None where the request has ended. Goes with a public look-up.
    """
    return engine.output_processor.request_states.get(engine_request_id)


def on_rendered_chat(
    wanted: Callable[[Any], bool], add: Callable[[Any, Sequence[Any], Any, dict[str, Any]], Awaitable[None]]
) -> None:
    """Let ``add(renderer, messages, chat_params, engine_input)`` add to the engine inputs of a server's chats.

    Where ``wanted(renderer)`` is true the engine input has ``prompt_token_offsets``: the characters of each token in
    ``prompt``, the rendered text. A renderer whose tokenizer can't say them leaves them out. They are removed again
    unless the request itself asks for them. Goes when vLLM says which tokens of a chat a message has.
    """
    from vllm.renderers.base import BaseRenderer

    @wrap(BaseRenderer, "render_chat_async")
    async def render_chat_async(
        original: Original,
        self: Any,
        conversations: Sequence[Any],
        chat_params: Any,
        tok_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not wanted(self):
            return await original(self, conversations, chat_params, tok_params, **kwargs)
        own = tok_params or self.default_chat_tok_params
        with_offsets = replace(own, return_token_offsets=True)
        rendered, engine_inputs = await original(self, conversations, chat_params, with_offsets, **kwargs)
        for messages, engine_input in zip(conversations, engine_inputs, strict=True):
            await add(self, messages, chat_params, engine_input)
            if not own.return_token_offsets:
                engine_input.pop("prompt_token_offsets", None)
        return rendered, engine_inputs


def before_tokenizing(check: Callable[[Any, str, Any], Any]) -> None:
    """Let ``check(renderer, text, params)`` give the TokenizeParams with which a server tokenises a text, or raise.

    Goes when vLLM bounds the text of each request.
    """
    from vllm.renderers.base import BaseRenderer

    @wrap(BaseRenderer, "_tokenize_singleton_prompt_async")
    async def tokenize(original: Original, self: Any, prompt: Any, params: Any) -> Any:
        text = prompt.get("prompt")
        if isinstance(text, str) and "prompt_token_ids" not in prompt and "prompt_embeds" not in prompt:
            params = check(self, text, params)
        return await original(self, prompt, params)
