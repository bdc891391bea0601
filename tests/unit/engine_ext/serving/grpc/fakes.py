"""A fake engine, and the gRPC server on it."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import grpc
from grpc_health.v1 import health_pb2_grpc
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import TokenizeParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from starling.config.entry import StarlingConfig
from starling.config.star import StarOptions
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.requests import PLANNED
from starling.engine_ext.serving.grpc.server import Front
from starling.scheduler.planning.decide import Decision
from starling.scheduler.planning.facts import EngineFacts
from starling.scheduler.planning.plan import describe
from starling.v1 import inference_pb2_grpc

PROMPT_TOKENS = 10


class FakeInputProcessor:
    """What front_state needs of an engine."""

    def __init__(self, vllm_config) -> None:
        self.vllm_config = vllm_config


class FakePlanner:
    """Plans every prompt dense, and counts the plans."""

    page_size = 32
    facts = EngineFacts(page_size)
    config = StarlingConfig()

    def __init__(self) -> None:
        self.defaults = StarOptions()
        self.planned: list[Decision] = []

    def prepare(self, engine_input, params, request_id=None, *, has_lora=False):
        ids = engine_input["prompt_token_ids"]
        decision = Decision(None, "star is off", len(ids), ids)
        self.planned.append(replace(decision, shown=self.describe(decision)))
        return {**engine_input, PLANNED: self.planned[-1]}

    def describe(self, decision) -> dict:
        return describe(decision.plan, decision.num_tokens)


class FakeTokenizer:
    """Makes PROMPT_TOKENS of each text."""

    max_chars_per_token = 10_000

    def __call__(self, text: str, **kwargs) -> dict[str, list[int]]:
        return {"input_ids": [1] * PROMPT_TOKENS}


class FakeEngine:
    """Streams ``script``: texts, RequestOutputs, an exception to raise, or None to wait for `release` first."""

    def __init__(self, *script, refuses: Exception | None = None, max_model_len: int = 1000) -> None:
        self.script = script
        self.release = asyncio.Event()
        self.ended: list[str] = []  # ids of generators that were closed, in any way
        self.admitted: list[int] = []
        self.calls: list[SimpleNamespace] = []  # what generate() was called with
        self.rendered: list[tuple] = []  # what the renderer was called with
        self.errored = False
        self.dead_error = EngineDeadError()
        self.renderer = self
        self.tokenizer = FakeTokenizer()
        tokenizing = TokenizeParams(max_total_tokens=max_model_len)
        self.default_cmpl_tok_params = self.default_chat_tok_params = tokenizing
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(policy="fcfs"),
            parallel_config=SimpleNamespace(data_parallel_size=1),
            additional_config={},
        )
        self.input_processor = FakeInputProcessor(self.vllm_config)
        self.planner = FakePlanner()
        front_state(self).planner = self.planner
        self.model_config = SimpleNamespace(
            max_model_len=max_model_len,
            max_logprobs=20,
            served_model_name=["fake", "alias"],
            get_vocab_size=lambda: 320,
            hf_config=SimpleNamespace(model_type="llama"),
            generation_config="auto",
            override_generation_config={},
            get_diff_sampling_param=dict,
        )
        self.refuses = refuses

    def check_admission(self, n: int) -> None:
        self.admitted.append(n)
        if self.refuses is not None:
            raise self.refuses

    def validate_token_ids(self, ids, parameter) -> None:
        if 999 in ids:
            raise VLLMValidationError("Token id 999 is out of vocabulary", parameter=parameter)

    async def render_cmpl_async(self, prompts, tok_params, prompt_extras):
        self.rendered.append((prompts, tok_params))
        return [{"type": "token", "prompt_token_ids": [1] * PROMPT_TOKENS} for _ in prompts]

    def get_tokenizer(self):
        return self.tokenizer

    async def render_messages_async(self, conversation, chat_params):
        self.rendered.append((conversation, chat_params))
        return conversation, {"prompt": "rendered"}

    async def render_chat_async(self, conversations, chat_params, tok_params, prompt_extras):
        self.rendered.append((conversations, chat_params, tok_params))
        return conversations, [{"type": "token", "prompt_token_ids": [1] * PROMPT_TOKENS}]

    async def generate(self, prompt, params, request_id, priority, lora_request, trace_headers=None):
        self.calls.append(SimpleNamespace(prompt=prompt, params=params, priority=priority, lora=lora_request))
        try:
            for step in self.script:
                if step is None:
                    await self.release.wait()
                elif isinstance(step, Exception):
                    raise step
                elif isinstance(step, RequestOutput):
                    yield step
                else:
                    yield result(output(step))
            if not self.script or not isinstance(self.script[-1], RequestOutput):
                yield result(output("", finish_reason="length"))
        finally:
            self.ended.append(request_id)


def output(text: str, index: int = 0, **fields) -> CompletionOutput:
    values = {"token_ids": [7] * len(text), "cumulative_logprob": None, "logprobs": None}
    return CompletionOutput(index=index, text=text, **values | fields)


def result(*outputs: CompletionOutput, cached: int = 4, prompt_logprobs=None) -> RequestOutput:
    return RequestOutput(
        "id", None, [1] * PROMPT_TOKENS, prompt_logprobs, list(outputs), False, num_cached_tokens=cached
    )


def merged(*outputs: RequestOutput) -> RequestOutput:
    """What a reader gets that comes after several outputs, from vLLM's own queue."""
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "id")
    for each in outputs:
        queue.put(each)
    return queue.get_nowait()


async def until(condition) -> None:
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def front_of(engine, api_keys=(), credentials=None, channel_credentials=None):
    front = Front(engine, list(api_keys))
    port = await front.start("127.0.0.1:0", credentials)
    address = f"localhost:{port}"
    if channel_credentials is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        channel = grpc.aio.secure_channel(address, channel_credentials)
    async with channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            yield SimpleNamespace(
                front=front,
                address=address,
                stub=stub,
                generate=stub.GenerateStream,
                health=health_pb2_grpc.HealthStub(channel),
            )
        finally:
            await front.stop(0)
