"""Bounds of what a client sends and is told."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from vllm import envs
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.renderers import TokenizeParams
from vllm.renderers.hf import HfRenderer
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.async_utils import make_async

from starling.config.parsing import OptionError, shown
from starling.config.star import parse_options
from starling.engine_ext.front import bounds
from starling.engine_ext.front.call import Call
from starling.engine_ext.front.planning import rejection
from starling.engine_ext.front.requests import RequestPlanner, check_openai_request
from starling.engine_ext.serving.cli import serve
from starling.engine_ext.serving.grpc import inference
from starling.engine_ext.serving.grpc.messages import error_status, grpc_code
from starling.v1 import inference_pb2 as pb
from starling.vllm_compat.front import before_tokenizing
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, front_of

DOCS = Path(__file__).parents[4] / "docs" / "security.md"
HUGE = 4 * 2**20


def params_of(bound: bounds.Bound, size: int) -> SamplingParams:
    """Sampling parameters in which the field of a bound has a size."""
    name = bound.field.rpartition(".")[2]
    if bound is bounds.LOGIT_BIAS:
        return SamplingParams(logit_bias=dict.fromkeys(range(size), 0.0))
    if bound is bounds.STOP_TOKENS:
        return SamplingParams(stop_token_ids=list(range(size)))
    if bound in (bounds.STOP, bounds.BAD_WORDS):
        return SamplingParams(**{name: [str(index) for index in range(size)]})
    if bound is bounds.BAD_WORDS_TEXT:
        return SamplingParams(bad_words=["a" * (size - 1), "b"])
    if bound is bounds.CHOICES:
        return SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"] * size))
    value = ["a" * (size - 1), "a"] if name == "choice" else "a" * size
    return SamplingParams(structured_outputs=StructuredOutputsParams(**{name: value}))


@pytest.mark.parametrize("change", [-1, 0, 1])
@pytest.mark.parametrize("bound", bounds.PARAMS_BOUNDS, ids=lambda bound: f"{bound.field} {bound.unit}")
def test_parameters_have_bounds_on_both_fronts(bound, change):
    """Both fronts hand their parameters to the engine by `generate`, where vLLM's hook checks them first."""
    params = params_of(bound, bound.limit + change)
    planner = RequestPlanner(SimpleNamespace(additional_config={}))
    if change <= 0:
        planner.prepare({"prompt_token_ids": [1]}, params, "id")
        return
    words = f"{bound.field} is refused: it has {bound.limit + 1} {bound.unit}, and may have {bound.limit} at most"
    with pytest.raises(VLLMValidationError, match=re.escape(words)):
        planner.prepare({"prompt_token_ids": [1]}, params, "id")


def test_an_object_as_schema_counts_as_its_json():
    schema = {"type": "object", "description": "a" * bounds.GRAMMARS[1].limit}
    with pytest.raises(VLLMValidationError, match=r"structured_outputs\.json is refused"):
        bounds.check_params(SamplingParams(structured_outputs=StructuredOutputsParams(json=schema)))
    bounds.check_params(PoolingParams())
    bounds.check_params(SamplingParams(stop="a" * 1000))


class CountingTokenizer:
    """Makes a token of each character, and counts the characters that it was given."""

    max_chars_per_token, truncation_side = 4, "left"

    def __init__(self) -> None:
        self.given = 0

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
        self.given += len(text)
        return {"input_ids": list(map(ord, text))}


def tokenized(text: str, params: TokenizeParams) -> tuple[list[int], int]:
    """The tokens that vLLM's renderer makes of a text, and the number of characters that the tokenizer had of it."""
    before_tokenizing(bounds.bounded_text)
    tokenizer = CountingTokenizer()
    renderer = object.__new__(HfRenderer)
    renderer.model_config = SimpleNamespace(max_model_len=10)
    renderer.tokenizer = tokenizer
    renderer._tokenize_prompt_async = make_async(renderer._tokenize_prompt)  # as the renderer itself does
    (prompt,) = asyncio.run(renderer.tokenize_prompts_async([{"prompt": text}], params))
    return prompt["prompt_token_ids"], tokenizer.given


def test_no_text_above_the_context_is_tokenised():
    """`/tokenize` names no context, so that vLLM has no bound of its own."""
    params = TokenizeParams(max_total_tokens=None)
    assert tokenized("a" * 40, params) == ([ord("a")] * 40, 40)
    with pytest.raises(VLLMValidationError, match=r"has 41 characters; 40 make more tokens than the 10 of the model"):
        tokenized("a" * 41, params)


@pytest.mark.parametrize(("side", "kept"), [(None, "b"), ("left", "b"), ("right", "a")])
def test_a_text_that_is_truncated_is_cut_before_it_is_tokenised(side, kept):
    """By the side that the request names, or else the tokenizer's."""
    params = TokenizeParams(max_total_tokens=10, truncate_prompt_tokens=3, truncation_side=side)
    assert tokenized("a" * 500 + "b" * 500, params) == ([ord(kept)] * 3, 40)


def test_the_id_in_a_request_of_openai_has_a_bound():
    limit = bounds.REQUEST_ID.limit
    check_openai_request(CompletionRequest(model="m", prompt="a", request_id="x" * limit))
    with pytest.raises(VLLMValidationError, match="request_id is refused"):
        check_openai_request(CompletionRequest(model="m", prompt="a", request_id="x" * (limit + 1)))


def test_the_documentation_lists_the_bounds():
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    for bound in bounds.BOUNDS:
        field = bound.field if "`" in bound.field else f"`{bound.field}`"
        assert f"| {field} | {bound.limit:,} {bound.unit} | {bound.fronts} |" in rows, bound
    assert f"at most {bounds.MAX_ERROR_BYTES // 1024} KiB" in DOCS.read_text()


@pytest.mark.parametrize(
    "text",
    ["", "x" * bounds.MAX_ERROR_BYTES, "ü" * (bounds.MAX_ERROR_BYTES // 2), "\ud800"],
    ids=["empty", "ASCII", "two bytes", "half a pair"],
)
def test_a_short_message_is_whole(text):
    assert bounds.shortened(text) == text


@pytest.mark.parametrize("filler", ["x", "ü", "😀", "\x01", "\ud800"], ids=ascii)
def test_of_a_long_message_the_ends_are_left(filler):
    message = bounds.shortened(f"start{filler * HUGE}end")
    assert message.startswith("start") and message.endswith("end") and bounds.CUT in message
    assert len(message.encode()) <= bounds.MAX_ERROR_BYTES


@pytest.mark.parametrize(
    "options",
    [
        {"star": "\x01" * HUGE},
        {"star": ["\x01" * HUGE]},
        {"star_segments": "\x01" * HUGE},
        {"star_" + "\x01" * HUGE: 1},
        {"star_block_size": {"\x01" * HUGE: "\x01" * HUGE}},
    ],
    ids=["text", "list", "segments", "name", "object"],
)
def test_a_refused_option_is_quoted_in_part(options):
    with pytest.raises(OptionError) as refused:
        parse_options(options)
    error = rejection(refused.value)
    assert len(str(error.args[0]).encode()) <= bounds.MAX_ERROR_BYTES
    assert len(error.parameter.encode()) <= bounds.MAX_ERROR_BYTES
    assert len(error_status(error, grpc_code(error), "text").SerializeToString()) < 2.5 * bounds.MAX_ERROR_BYTES


@pytest.mark.parametrize("value", ["on", "x" * 200, 3, {"a": {"b": 1}}, True, None, 0.5], ids=str)
def test_a_short_value_is_shown_whole(value):
    assert shown(value) == repr(value)


async def refusal_of(request: pb.GenerateStreamRequest) -> tuple[grpc.aio.AioRpcError, FakeEngine]:
    engine = FakeEngine("a")
    async with front_of(engine) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.generate(request).read()
        return refused.value, engine


def sampling(**fields) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(text="abc", sampling=fields)


def extra_args(size: int) -> str:
    return '{"a": "' + "x" * (size - len('{"a": ""}')) + '"}'


CONTEXT = 1000  # of the fake engine's model
WORST = {
    "request_id": (pb.GenerateStreamRequest(text="abc", request_id="x" * 7 * 2**20), "request_id", 256),
    "lora_name": (pb.GenerateStreamRequest(text="abc", lora_name="x" * 7 * 2**20), "lora_name", 256),
    "one character": (pb.GenerateStreamRequest(text="abc", lora_name="x" * 257), "lora_name", 256),
    "extra_args": (sampling(extra_args=extra_args(7 * 2**20)), "sampling.extra_args", 65536),
    "extra_args, deep": (sampling(extra_args="[" * 7 * 2**20), "sampling.extra_args", 65536),
    "extra_args, one character": (sampling(extra_args=extra_args(65537)), "sampling.extra_args", 65536),
    "logit_bias": (sampling(logit_bias=dict.fromkeys(range(500_000), 1.0)), "message", 32768),
    "logit_bias, one token": (sampling(logit_bias=dict.fromkeys(range(16385), 1.0)), "sampling.logit_bias", 16384),
    "stop_token_ids": (sampling(stop_token_ids=[0] * 7 * 2**20), "sampling", 262144),
    "stop": (sampling(stop=["x"] * 2_000_000), "message", 32768),
    "bad_words": (sampling(bad_words=["x" * 7 * 2**20]), "sampling", 262144),
    "regex": (sampling(structured_outputs={"regex": "x" * 7 * 2**20}), "sampling", 262144),
    "offsets": (
        pb.GenerateStreamRequest(text="abc", star={"segment_offsets": range(2_500_000)}),
        "star.segment_offsets",
        CONTEXT,
    ),
    "offsets, one": (
        pb.GenerateStreamRequest(text="abc", star={"segment_offsets": range(CONTEXT + 1)}),
        "star.segment_offsets",
        CONTEXT,
    ),
}


@pytest.mark.parametrize("case", WORST)
def test_a_field_above_its_bound_is_refused_before_it_is_parsed(case, monkeypatch):
    request, field, limit = WORST[case]
    parsed = []
    for name in ("star_args", "render", "sampling_params"):
        monkeypatch.setattr(inference, name, lambda *arguments, name=name: parsed.append(name))
    refused, engine = asyncio.run(refusal_of(request))
    violation = error_details_pb2.BadRequest()
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert rpc_status.from_call(refused).details[0].Unpack(violation)
    assert violation.field_violations[0].field == field
    assert str(limit) in refused.details()
    assert (parsed, engine.admitted) == ([], [])


@pytest.mark.parametrize("case", WORST)
def test_the_check_of_a_request_takes_few_operations_however_large_it_is(case):
    """It counts calls, and allows only those that make no object of each element."""
    request, calls = WORST[case][0], []

    def note(frame, event, function):
        if event == "c_call":
            calls.append(function.__name__)

    sys.setprofile(note)
    try:
        with pytest.raises(VLLMValidationError):
            bounds.check_request(request, CONTEXT)
    finally:
        sys.setprofile(None)
    assert calls.count("len") + calls.count("ByteSize") >= 1
    assert len(calls) < 50 and not {"loads", "dumps", "ListFields", "items", "keys", "values"} & set(calls)


def test_a_request_at_its_bounds_is_served():
    async def scenario():
        async with front_of(FakeEngine("a")) as client:
            fields = {
                "extra_args": extra_args(bounds.EXTRA_ARGS.limit),
                "logit_bias": dict.fromkeys(range(100), 1.0),
            }
            names = {"request_id": "x" * bounds.REQUEST_ID.limit}
            request = pb.GenerateRequest(text="abc", sampling=fields, **names)
            return (await client.stub.Generate(request, timeout=300)).choices[0].text

    assert asyncio.run(scenario()) == "a"
    biases = dict.fromkeys(range(bounds.LOGIT_BIAS.limit), -100.0)
    offsets = {"segment_offsets": range(CONTEXT)}
    request = pb.GenerateStreamRequest(
        text="abc", lora_name="x" * bounds.LORA_NAME.limit, sampling={"logit_bias": biases}, star=offsets
    )
    bounds.check_request(request, CONTEXT)


@pytest.mark.parametrize(("chosen", "limit"), [(None, bounds.MAX_CHOICES), ("500", 500)], ids=["default", "chosen"])
def test_a_server_has_a_bound_of_choices(monkeypatch, chosen, limit):
    """`starling serve` sets its default at once; vLLM refuses more, over HTTP and gRPC."""
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setenv(bounds.MAX_CHOICES_ENV, chosen or "")
    if chosen is None:
        monkeypatch.delenv(bounds.MAX_CHOICES_ENV)

    def stop(argv):
        raise ValueError("stop")

    for name in ("set_up_environment", "on_server_socket"):
        monkeypatch.setattr(serve, name, lambda *_: None)
    monkeypatch.setattr(serve, "parse", stop)
    assert serve.run([]) == serve.UNUSABLE

    async def scenario():
        engine = FakeEngine("a")
        async with front_of(engine) as client:
            number = (await client.stub.GetCapabilities(pb.GetCapabilitiesRequest())).max_n
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client.generate(pb.GenerateStreamRequest(text="abc", sampling={"n": limit + 1})).read()
            return number, refused.value, engine.calls

    number, refused, calls = asyncio.run(scenario())
    violation = error_details_pb2.BadRequest()
    assert rpc_status.from_call(refused).details[0].Unpack(violation)
    assert (number, calls, violation.field_violations[0].field) == (limit, [], "sampling.n")
    assert str(limit) in refused.details() and bounds.MAX_CHOICES_ENV in refused.details()
    assert CompletionRequest(prompt="abc", n=limit, temperature=1).to_sampling_params(9).n == limit
    with pytest.raises(VLLMValidationError):
        CompletionRequest(prompt="abc", n=limit + 1, temperature=1).to_sampling_params(9)


def test_the_documentation_has_the_bound_of_choices():
    text = DOCS.read_text()
    assert f"{bounds.MAX_CHOICES} choices, or what `{bounds.MAX_CHOICES_ENV}` says" in text


def test_an_error_of_any_length_reaches_the_client():
    """gRPC would put RESOURCE_EXHAUSTED in place of a status above its limit."""

    async def scenario():
        async with front_of(FakeEngine("a", ValueError("ü" * HUGE))) as client:
            call = client.generate(pb.GenerateStreamRequest(text="abc"))
            await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call.read()
            return failed.value

    failed = asyncio.run(scenario())
    assert failed.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert bounds.CUT in failed.details()
    assert rpc_status.from_call(failed).details


def test_a_call_has_a_bound_of_sequences():
    call = Call()
    for index in range(8):
        call.add_request(str(index), bounds.SEQUENCES.limit // 8)
    with pytest.raises(VLLMValidationError, match="prompts times choices is refused"):
        call.add_request("8", 1)
    assert len(call.request_ids) == 8
