"""The hooks around vLLM's AsyncLLM and its processors, on vLLM's own classes."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import pytest
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.entrypoints.serve.engine.protocol import ErrorInfo
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.entrypoints.speech_to_text.base.serving import SpeechToTextBaseServing
from vllm.exceptions import RetryableRequestError, VLLMValidationError
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason, output_processor
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats

from starling.vllm_compat import front
from tests.unit.engine_ext.front.virtual_time import now, run, until


def test_the_names_that_are_hooked_are_there():
    """A new vLLM that moves one of these fails here first."""
    assert {"request_id", "prompt", "params"} <= inspect.signature(InputProcessor.process_inputs).parameters.keys()
    assert {"prompt", "sampling_params"} <= inspect.signature(AsyncLLM.generate).parameters.keys()
    builtin_tools = inspect.signature(OpenAIServingResponses._generate_with_builtin_tools).parameters
    assert {"engine_input", "sampling_params"} <= builtin_tools.keys()


@pytest.mark.parametrize("shim", ["on_generate", "on_beam_search"])
def test_each_hook_is_still_needed(shim):
    """Fails when vLLM does by itself what the hook is for: then the hook can go."""
    if shim == "on_generate":
        assert inspect.isasyncgenfunction(inspect.unwrap(AsyncLLM.generate))
    else:
        assert "extra_args" not in BeamSearchParams.__struct_fields__


def test_a_processed_request_is_seen_with_its_prompt(monkeypatch):
    seen = []
    monkeypatch.setattr(InputProcessor, "process_inputs", lambda self, name, prompt, **_: f"request of {prompt}")
    for _ in range(2):
        front.on_processed_request(lambda *args: seen.append(args))
    processor = object.__new__(InputProcessor)
    assert processor.process_inputs("me", "prompt", params=None) == "request of prompt"
    assert seen == [(processor, "request of prompt", "prompt")]


@pytest.fixture
def hooked(monkeypatch):
    """vLLM's two classes with the hook around plain functions; returns what happened."""
    events = []

    def generate(self, prompt, sampling_params, request_id, **keywords):
        events.append(("engine", prompt, request_id, keywords))
        return "outputs"

    def with_tools(self, request_id, engine_input, sampling_params, **keywords):
        return self.engine_client.generate(engine_input, sampling_params, "me_0")

    def prepare(processor, prompt, params, request_id, *, has_lora):
        events.append(("prepare", processor, prompt, params, request_id, has_lora))
        return f"{prompt} prepared"

    def around(engine, generate, prompt, params, request_id, keywords):
        return "around", generate(prompt, params, request_id, **keywords)

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    monkeypatch.setattr(AsyncLLM, "__del__", lambda self: None)
    monkeypatch.setattr(OpenAIServingResponses, "_generate_with_builtin_tools", with_tools)
    front.on_generate(prepare, around)
    return events


def test_a_prompt_is_prepared_before_its_outputs_are_asked_for(hooked):
    engine = object.__new__(AsyncLLM)
    engine.input_processor = "processor"
    assert engine.generate("prompt", "params", "me", priority=3) == ("around", "outputs")
    assert engine.generate("prompt", "params", "me", lora_request="an adapter") == ("around", "outputs")
    assert hooked == [
        ("prepare", "processor", "prompt", "params", "me", False),
        ("engine", "prompt prepared", "me", {"priority": 3}),
        ("prepare", "processor", "prompt", "params", "me", True),
        ("engine", "prompt prepared", "me", {"lora_request": "an adapter"}),
    ]


def test_the_responses_api_prepares_a_prompt_before_its_own_generator_is_made(hooked):
    engine = object.__new__(AsyncLLM)
    engine.input_processor = "processor"
    serving = object.__new__(OpenAIServingResponses)
    serving.engine_client = engine
    outputs = serving._generate_with_builtin_tools(request_id="me", engine_input="prompt", sampling_params="params")
    assert outputs == ("around", "outputs")
    assert hooked[0] == ("prepare", "processor", "prompt", "params", None, False)
    assert hooked[1] == ("prepare", "processor", "prompt prepared", "params", "me_0", False)


def test_the_responses_api_over_another_engine_client_is_vllms(hooked):
    serving = object.__new__(OpenAIServingResponses)
    serving.engine_client = SimpleNamespace(generate=lambda *args: args)
    outputs = serving._generate_with_builtin_tools(request_id="me", engine_input="prompt", sampling_params="params")
    assert outputs == ("prompt", "params", "me_0")
    assert hooked == []


@pytest.fixture
def serving(monkeypatch):
    """A serving class that asks for a request's model as vLLM's own do."""

    async def check_model(self, request):
        return None if request.model == "served" else "no such model"

    monkeypatch.setattr(BaseServing, "_check_model", check_model)
    monkeypatch.setattr(AnthropicServingMessages, "create_messages", lambda self, request, raw_request: None)
    return object.__new__(type("Serving", (BaseServing,), {}))


@pytest.mark.parametrize(("model", "answer"), [("served", None), ("another", "no such model")])
def test_an_openai_request_is_checked_once_its_model_is_there(serving, model, answer):
    checked = []
    for _ in range(2):
        front.on_openai_request(checked.append, lambda names: None)
    request = CompletionRequest.model_construct(model=model)
    assert asyncio.run(serving._check_model(request)) == answer
    assert checked == ([request] if answer is None else [])


@pytest.mark.parametrize(
    "function",
    [
        OpenAIServingChat.render_chat_request,
        OpenAIServingChatBatch.render_batch_chat_request,
        OpenAIServingCompletion.render_completion_request,
        OpenAIServingResponses._create_responses,
        ServingRender.render_chat_request,
        ServingRender.render_completion_request,
        ServingRender.render_responses_request,
        ServingTokenization.create_tokenize,
        SpeechToTextBaseServing._create_speech_to_text,
    ],
    ids=lambda function: function.__qualname__,
)
def test_whatever_renders_a_prompt_first_asks_for_the_model(function):
    """A way past the question would be a way past the check of star options."""
    _, first, _ = inspect.getsource(function).split("await ", 2)
    assert first.startswith("self._check_model(request)")
    assert "_check_model" not in vars(function.__globals__[function.__qualname__.split(".")[0]])


def test_a_beam_search_is_seen_for_each_prompt(monkeypatch):
    seen = []
    monkeypatch.setattr(BeamSearchOnlineMixin, "beam_search", lambda self, *args, **keywords: (args, keywords))
    for _ in range(2):
        front.on_beam_search(lambda: seen.append("prompt"))
    search = object.__new__(type("Serving", (BeamSearchOnlineMixin,), {}))
    assert search.beam_search("prompt", request_id="me") == (("prompt",), {"request_id": "me"})
    assert seen == ["prompt"]


@pytest.fixture
def plain_errors(monkeypatch):
    """vLLM's errors without the hook."""
    if "__init__" in vars(ErrorInfo):
        monkeypatch.delattr(ErrorInfo, "__init__")


@pytest.fixture
def short_errors(plain_errors):
    """vLLM's errors with the hook, which is asked for twice."""
    for _ in range(2):
        front.on_error_text(lambda text, name: f"{name}: {text}", lambda text: f"<{text[:20]}>")
    yield
    del ErrorInfo.__init__


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (VLLMValidationError("x" * 99, parameter="yy"), (f"<yy: {'x' * 16}>", "<yy>")),
        (VLLMValidationError("x", parameter="y" * 99), (f"<{'y' * 20}>", f"<{'y' * 20}>")),
        ("short", ("<None: short>", None)),
    ],
    ids=["exception", "long name", "text"],
)
def test_the_error_of_a_request_is_explained_and_shortened(short_errors, error, shown):
    answer = create_error_response(error).error
    assert (answer.message, answer.param) == shown


def test_an_error_is_as_long_as_its_text_without_the_hook(plain_errors):
    """Fails when vLLM bounds its errors: then on_error_text can go."""
    assert create_error_response("x" * 10**5).error.message == "x" * 10**5


# Calls to engine cores.


class FakeClient:
    """An engine-core client whose utilities answer once their gate is open."""

    def __init__(self) -> None:
        self.gate, self.error = asyncio.Event(), None
        self.core_engines = ["one", "two"]

    async def _call_utility_async(self, name, *args, engine):
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return engine, name, *args


def fake_engine(client: FakeClient) -> SimpleNamespace:
    return SimpleNamespace(engine_core=client, errored=False, dead_error=EngineDeadError())


def test_a_utility_is_called_in_one_engine_core():
    async def scenario():
        engine = fake_engine(FakeClient())
        engine.engine_core.gate.set()
        assert front.num_engine_cores(engine) == 2
        assert await front.call_engine_core(engine, 1, "name", 1) == ("two", "name", 1)

    run(scenario)


def test_a_call_to_an_engine_core_that_dies_ends():
    async def scenario():
        engine = fake_engine(FakeClient())
        call = asyncio.create_task(front.call_engine_core(engine, 0, "name"))
        await asyncio.sleep(5)
        assert not call.done()
        engine.errored = True
        with pytest.raises(EngineDeadError):
            await call
        assert now() < 5 + 2 * front.DEATH_CHECK_SECONDS
        with pytest.raises(EngineDeadError):
            await front.call_engine_core(engine, 0, "name")

    run(scenario)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(Exception(front.SHUTTING_DOWN), RetryableRequestError), (ValueError("another"), ValueError)],
)
def test_the_error_of_a_utility_is_raised(error, raised):
    async def scenario():
        engine = fake_engine(FakeClient())
        engine.engine_core.gate.set()
        engine.engine_core.error = error
        with pytest.raises(raised):
            await front.call_engine_core(engine, 0, "name")

    run(scenario)


# Requests of Starling's own.


class FakeEngine:
    """An AsyncLLM as far as run_internal_request uses it, on vLLM's own output processor."""

    def __init__(self) -> None:
        self.output_processor = OutputProcessor(None, log_stats=True, stream_interval=1)
        self.input_processor = SimpleNamespace(assign_request_id=InputProcessor.assign_request_id)
        self.engine_core = SimpleNamespace(add_request_async=self.add)
        self.added, self.aborted = [], []
        self.internal_ids: set[str] = set()
        self.error: Exception | None = None
        self._run_output_handler = lambda: None

    async def add(self, request) -> None:
        if self.error is not None:
            raise self.error
        self.added.append(request)

    async def abort(self, request_id, internal) -> None:
        self.aborted.append((request_id, internal))
        self.output_processor.abort_requests([request_id], internal)

    def run(self) -> asyncio.Task:
        return asyncio.create_task(front.run_internal_request(self, request(), self.internal_ids))


def request(name: str = "mine") -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, detokenize=False),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def finished(name: str) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=name, new_token_ids=[7], finish_reason=FinishReason.LENGTH, kv_transfer_params={"pages": [4]}
    )


def test_a_request_that_can_not_be_sent_does_not_count_as_one_that_runs(monkeypatch):
    """Such as one with a number that msgpack can't encode."""
    monkeypatch.setattr(AsyncLLM, "_add_request", inspect.unwrap(AsyncLLM._add_request))
    front.abort_unsent_requests()
    engine = FakeEngine()
    engine.check_admission, engine.log_requests = lambda **_: None, False
    engine.error = OverflowError("Integer value out of range")
    unsent = request()
    unsent.external_req_id = "client"
    with pytest.raises(OverflowError):
        run(lambda: AsyncLLM._add_request(engine, unsent, None, None, 0, None))
    assert engine.aborted == [("mine", True)]
    assert engine.output_processor.get_num_unfinished_requests() == 0


def test_an_offline_request_that_can_not_be_sent_is_not_waited_for(monkeypatch):
    def refuse(request):
        raise OverflowError("Integer value out of range")

    monkeypatch.setattr(LLMEngine, "add_request", inspect.unwrap(LLMEngine.add_request))
    monkeypatch.setattr(LLMEngine, "__del__", lambda self: None, raising=False)
    front.abort_unsent_requests()
    engine = object.__new__(LLMEngine)
    engine.output_processor = OutputProcessor(None, log_stats=True, stream_interval=1)
    engine.engine_core = SimpleNamespace(add_request=refuse, abort_requests=lambda ids: None)
    engine.input_processor = SimpleNamespace(
        assign_request_id=InputProcessor.assign_request_id,
        resolve_watermarking=lambda params: None,
        apply_watermarking=lambda params, config: None,
    )
    before = request("before")
    before.external_req_id = "mine"
    engine.output_processor.add_request(before, None)
    with pytest.raises(OverflowError):
        engine.add_request("mine", request(), request().sampling_params)
    assert list(engine.output_processor.request_states) == ["before"]


def test_internal_requests_end_with_their_output_and_are_in_no_statistics():
    async def scenario():
        engine = FakeEngine()
        processor = engine.output_processor
        task = engine.run()
        await until(lambda: engine.added)
        (name,) = front.engine_request_ids(engine, "mine")
        assert name == engine.added[0].request_id != "mine"
        assert front.request_state(engine, name).external_req_id == "mine"
        assert processor.get_num_unfinished_requests() == 0
        clients = request("client-1")
        clients.external_req_id = "client"
        processor.add_request(clients, None)
        assert processor.get_num_unfinished_requests() == 1
        assert front.unfinished_ids(engine) == (["mine", "client"], [name, "client-1"])
        stats = IterationStats()
        processor.process_outputs([finished(name)], 1.0, stats)
        output = await task
        assert output.kv_transfer_params == {"pages": [4]}
        assert (stats.num_prompt_tokens, stats.num_generation_tokens, stats.finished_requests) == (0, 0, [])
        assert engine.aborted == []
        assert engine.internal_ids == set()
        processor.process_outputs([finished("client-1")], 1.0, stats)
        assert (stats.num_generation_tokens, len(stats.finished_requests)) == (1, 1)

    run(scenario)


def test_internal_requests_are_aborted_when_cancelled_and_by_the_id_of_their_maker():
    async def scenario():
        engine = FakeEngine()
        task = engine.run()
        await until(lambda: engine.added)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.aborted == [(engine.added[0].request_id, True)]

        task = engine.run()
        await until(lambda: len(engine.added) == 2)
        engine.output_processor.abort_requests(["mine"], internal=False)
        assert (await task).outputs[0].finish_reason == "abort"
        assert front.unfinished_ids(engine) == ([], [])

    run(scenario)


def test_an_internal_request_that_can_not_be_sent_leaves_nothing():
    async def scenario():
        engine = FakeEngine()
        engine.error = RuntimeError("not sent")
        with pytest.raises(RuntimeError, match="not sent"):
            await engine.run()
        assert front.unfinished_ids(engine) == ([], [])
        assert engine.internal_ids == set()

    run(scenario)


# Drains.


def test_new_requests_are_refused_after_a_drain():
    engine = object.__new__(AsyncLLM)
    assert {"n", "request_id"} <= inspect.signature(AsyncLLM.check_admission).parameters.keys()
    front.refuse_admission(engine, lambda: RuntimeError("draining"))
    for arguments in ({}, {"n": 2, "request_id": "me"}):
        with pytest.raises(RuntimeError, match="draining"):
            engine.check_admission(**arguments)


@pytest.mark.parametrize("has_processes", [True, False])
def test_callbacks_run_around_the_end_of_the_engine_and_take_of_its_time(monkeypatch, has_processes):
    events, now = [], [100.0]

    class Resources:
        """Those of vLLM's client, closed when it is called."""

        engine_manager = (
            SimpleNamespace(shutdown=lambda timeout: events.append(("processes", timeout))) if has_processes else None
        )

        def __call__(self):
            events.append("sockets")

    def engine(detached=True):
        client = object.__new__(AsyncMPClient)
        client.resources, client._finalizer = Resources(), SimpleNamespace(detach=lambda: detached)
        engine = object.__new__(AsyncLLM)
        engine.renderer, engine.engine_core = None, client
        engine.output_handler = SimpleNamespace(
            done=lambda: False, get_loop=lambda: loop, cancel=lambda: events.append("cancelled")
        )
        return engine

    loop = SimpleNamespace(is_closed=lambda: False, call_soon_threadsafe=lambda call, *args: call(*args))
    monkeypatch.setattr(front.time, "monotonic", lambda: now[0])
    monkeypatch.delattr(AsyncLLM, "__del__")  # it shuts the engine down once more

    def before(timeout):
        events.append(("before", timeout))
        now[0] += 2

    for timeout, left in ((30, 28), (0, front.ENGINE_SECONDS), (None, None)):
        stopped = engine()
        front.around_shutdown(stopped, before, lambda: events.append("after"))
        stopped.shutdown(timeout=timeout)
        if has_processes:
            ended = [("processes", left), "cancelled", "after", "sockets"]
        else:
            ended = ["sockets", "cancelled", "after"]
        # At last vLLM cancels what read the outputs once more.
        assert events == [("before", timeout), *ended, "cancelled"]
        events.clear()
    dead = engine(detached=None)  # vLLM's client has ended by itself, as of an engine that has died
    front.around_shutdown(dead, before, lambda: events.append("after"))
    dead.shutdown(timeout=30)
    assert events.count("after") == 1


def test_each_output_of_a_request_has_its_plan_and_where_its_documents_came_from(monkeypatch):
    class State:
        @classmethod
        def from_new_request(cls, tokenizer, request, parent_req=None, **more):
            state = cls()
            state.parent_req = parent_req
            return state

        def make_request_output(self, tokens, pooled, finish, stop, transfer=None, more=None):
            return SimpleNamespace(tokens=tokens, transfer=transfer, more=more) if tokens else None

    monkeypatch.setattr(output_processor, "RequestState", State)
    noted = []
    described = []

    def plan_of(request):
        described.append(request)
        return f"plan of {request}"

    front.on_request_output(plan_of, "sources", noted.append)
    parent = SimpleNamespace()
    samples = [State.from_new_request("tokenizer", f"sample {number}", parent_req=parent) for number in range(128)]
    assert described == ["sample 0"], "the plan of n samples is described once"
    assert {sample.star_plan for sample in samples} == {"plan of sample 0"} and len(noted) == 128
    noted.clear()
    state = State.from_new_request("tokenizer", "me", prompt=None)
    assert noted == ["me"]
    plain = {"tokens": [1], "plan": "plan of me", "more": "more"}
    others = {"theirs": 1}
    before = state.make_request_output([1], None, None, None, others, "more")
    assert vars(before) == plain | {"transfer": others, "document_sources": None}
    assert state.make_request_output([], None, None, None, {"sources": [{"memory": 1}]}) is None, "a later one has them"
    after = state.make_request_output([1], None, None, None, more="more")
    assert vars(after) == plain | {"transfer": None, "document_sources": [{"memory": 1}]}
    both = state.make_request_output([1], None, None, None, {"sources": [], **others}, "more")
    assert vars(both) == plain | {"transfer": others, "document_sources": []}


@pytest.mark.parametrize("refused", [None, "its fields", "its options"])
def test_an_anthropic_request_is_checked_by_its_unknown_fields(serving, monkeypatch, refused):
    """vLLM's model of it drops them. An error of the client is an answer: vLLM's path would log it with its stack."""

    async def create_messages(self, request, raw_request):
        if refused == "its options":
            raise VLLMValidationError("star is refused")
        return request.model

    async def read():
        return {"model": "m", "metadata": {"star": "on"}, "star": "on"}

    def check_unknown(fields):
        assert fields == {"star": "on"}
        if refused == "its fields":
            raise VLLMValidationError("star is refused")

    monkeypatch.setattr(AnthropicServingMessages, "create_messages", create_messages)
    monkeypatch.setattr(AnthropicServingMessages, "create_error_response", lambda self, error: str(error))
    front.on_openai_request(lambda request: None, check_unknown)
    messages = object.__new__(AnthropicServingMessages)
    request = AnthropicMessagesRequest(model="m", messages=[], max_tokens=1)
    answer = asyncio.run(messages.create_messages(request, SimpleNamespace(json=read)))
    assert answer == ("star is refused" if refused else "m")
