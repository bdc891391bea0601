"""The calls of InferenceService on a fake engine: what each field does, and what is refused."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import Logprob
from vllm.v1.engine.exceptions import EngineDeadError

from starling.engine_ext.front.bounds import NO_GRAMMAR
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.requests import PLANNED
from starling.engine_ext.serving.grpc.server_options import MAX_REQUEST_BYTES
from starling.scheduler.planning.facts import EngineFacts
from starling.v1 import inference_pb2 as pb
from starling.vllm_compat.versions import vllm_version
from tests.unit.engine_ext.serving.grpc.fakes import PROMPT_TOKENS, FakeEngine, front_of, merged, output, result


def call(engine: FakeEngine, method: str, request):
    """The response of a call, or for a stream the list of its events."""

    async def scenario():
        async with front_of(engine) as client:
            response = getattr(client.stub, method)(request)
            return [event async for event in response] if method == "GenerateStream" else await response

    return asyncio.run(scenario())


def refusal(engine: FakeEngine, method: str, request) -> tuple[grpc.StatusCode, str, list[str]]:
    """Code, text and the fields that are named."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        call(engine, method, request)
    details = error_details_pb2.BadRequest()
    status = rpc_status.from_call(failed.value)
    if status is not None and status.details:
        status.details[0].Unpack(details)
    return failed.value.code(), failed.value.details(), [violation.field for violation in details.field_violations]


def three_choices() -> FakeEngine:
    """Interleaved, coalesced, and ending in another order than they began."""
    return FakeEngine(
        result(output("a", 0), output("x", 1), cached=4),
        result(output("12", 2), cached=8),
        result(output("y", 1, finish_reason="stop", stop_reason=5), output("b", 0), cached=8),
        result(output("", 2, finish_reason="length"), cached=8),
        result(output("c", 0, finish_reason="length"), cached=4),
    )


N3 = pb.SamplingParams(n=3)


def test_choices_are_separate_and_add_up():
    events = call(three_choices(), "GenerateStream", pb.GenerateStreamRequest(text="p", sampling=N3))
    texts = {index: "" for index in range(3)}
    finals = {}
    for event in events:
        if event.HasField("delta"):
            assert event.delta.index not in finals, "a delta after its choice's final"
            texts[event.delta.index] += event.delta.text
        else:
            assert event.final.index not in finals, "two finals of one choice"
            finals[event.final.index] = event.final
    assert texts == {0: "abc", 1: "xy", 2: "12"}
    assert [finals[index].usage.completion_tokens for index in range(3)] == [3, 2, 2]
    assert [finals[index].usage.prompt_tokens for index in range(3)] == [PROMPT_TOKENS, 0, 0]
    assert [finals[index].usage.cached_tokens for index in range(3)] == [4, 0, 0]
    assert finals[1].stop_token_id == 5
    assert events[-1].HasField("final")


def test_generate_is_the_stream_in_one_reply():
    reply = call(three_choices(), "Generate", pb.GenerateRequest(text="p", sampling=N3))
    assert [(choice.index, choice.text) for choice in reply.choices] == [(0, "abc"), (1, "xy"), (2, "12")]
    assert reply.usage == pb.Usage(prompt_tokens=PROMPT_TOKENS, cached_tokens=4, completion_tokens=7)
    assert reply.choices[1].stop_token_id == 5
    assert reply.plan.prompt_tokens == PROMPT_TOKENS


@pytest.mark.parametrize("num_merged", [1, 2, 3])
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_logprobs(method, num_merged):
    """The same, however many outputs vLLM has merged for a slow reader."""
    position = {7: Logprob(-0.25, 1, "a"), 8: Logprob(-2.0, 2, "b")}
    prompt = [None] + [{1: Logprob(-1.0, 1, "p")}] * (PROMPT_TOKENS - 1)
    outputs = [
        result(output("a", 0, logprobs=[position]), prompt_logprobs=prompt),
        result(output("a", 1, logprobs=[position]), prompt_logprobs=prompt),
        result(output("", 0, finish_reason="length"), output("", 1, finish_reason="length")),
    ]
    engine = FakeEngine(merged(*outputs[:num_merged]), *outputs[num_merged:])
    kind = {"Generate": pb.GenerateRequest, "GenerateStream": pb.GenerateStreamRequest}[method]
    got = call(engine, method, kind(text="p", sampling=pb.SamplingParams(n=2, logprobs=2, prompt_logprobs=1)))
    if method == "GenerateStream":
        assert [event.WhichOneof("event") for event in got] == ["prompt_logprobs", "delta", "delta", "final", "final"]
        of_prompt, chosen = got[0].prompt_logprobs, got[1].delta.logprobs
    else:
        of_prompt, chosen = got.prompt_logprobs, got.choices[0].logprobs
    assert len(of_prompt.tokens) == PROMPT_TOKENS
    assert (of_prompt.tokens[1].chosen.logprob, of_prompt.tokens[1].top[0].text) == (-1.0, "p")
    assert (chosen[0].chosen.logprob, [top.token_id for top in chosen[0].top]) == (-0.25, [7, 8])
    (generated,) = engine.calls
    assert (generated.params.n, generated.params.logprobs, generated.params.prompt_logprobs) == (2, 2, 1)


def test_each_prompt_is_planned_once():
    """The plan of the response is the one that the engine gets."""
    engine = FakeEngine("a")
    plan = call(engine, "Generate", pb.GenerateRequest(text="p")).plan
    (planned,) = engine.planner.planned
    assert engine.calls[0].prompt[PLANNED] is planned
    assert (planned.token_ids, plan.prompt_tokens) == ([1] * PROMPT_TOKENS, PROMPT_TOKENS)


def test_generate_fails_as_the_stream_does():
    assert refusal(FakeEngine(EngineDeadError()), "Generate", pb.GenerateRequest(text="p"))[0] == (
        grpc.StatusCode.UNAVAILABLE
    )
    code, _, fields = refusal(FakeEngine(), "Generate", pb.GenerateRequest())
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["prompt"])


def test_a_cancelled_generate_ends_the_request():
    async def scenario():
        engine = FakeEngine("a", None)
        async with front_of(engine) as client:
            call = client.stub.Generate(pb.GenerateRequest(text="p", request_id="mine"))
            async with asyncio.timeout(300):
                while not engine.calls:
                    await asyncio.sleep(0.01)
                call.cancel()
                while engine.ended != ["grpc-mine"]:
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_generate_and_the_stream_share_request_ids():
    async def scenario():
        engine = FakeEngine("a", None)
        async with front_of(engine) as client:
            stream = client.generate(pb.GenerateStreamRequest(text="p", request_id="mine"))
            await stream.read()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client.stub.Generate(pb.GenerateRequest(text="p", request_id="mine"))
            return refused.value.code()

    assert asyncio.run(scenario()) == grpc.StatusCode.ALREADY_EXISTS


CHAT = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])


def test_chat_is_generated_from():
    engine = FakeEngine("a")
    reply = call(engine, "Generate", pb.GenerateRequest(chat=CHAT))
    assert reply.choices[0].text == "a"
    assert engine.rendered[0][0] == [[{"role": "user", "content": "hi"}]]


def test_a_model_without_a_template():
    class Untemplated(FakeEngine):
        async def render_chat_async(self, *args, **kwargs):
            raise ValueError("you must provide a chat template")

        render_messages_async = render_chat_async

    for method, request in (("Generate", pb.GenerateRequest(chat=CHAT)), ("Tokenize", pb.TokenizeRequest(chat=CHAT))):
        code, text, fields = refusal(Untemplated(), method, request)
        assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["chat"])
        assert "chat template" in text


def test_tokenize():
    reply = call(FakeEngine(max_model_len=5), "Tokenize", pb.TokenizeRequest(text="p"))
    assert reply == pb.TokenizeResponse(token_ids=[1] * PROMPT_TOKENS, count=PROMPT_TOKENS, max_model_len=5)
    assert refusal(FakeEngine(), "Tokenize", pb.TokenizeRequest())[2] == ["prompt"]


class Models:
    """As far as the front reads vLLM's OpenAIServingModels."""

    def __init__(self, lora_requests: dict) -> None:
        self.lora_requests = lora_requests


def test_capabilities():
    engine = FakeEngine()
    models = Models(lora_requests={"b": 1, "a": 2})
    front_state(engine).set_serving_models(models)
    reply = call(engine, "GetCapabilities", pb.GetCapabilitiesRequest())
    assert (reply.models, reply.max_model_len, reply.vocabulary_size) == (["fake", "alias"], 1000, 320)
    assert (reply.kv_page_tokens, reply.star_available, list(reply.star_refusals)) == (32, True, [])
    assert reply.star_defaults.mode == pb.StarOptions.MODE_OFF
    assert (reply.max_request_bytes, reply.max_response_bytes) == (MAX_REQUEST_BYTES, 0)
    assert list(reply.lora_names) == ["a", "b"]
    assert reply.vllm_version == vllm_version()


def test_capabilities_say_why_there_is_no_star():
    engine = FakeEngine()
    planner = engine.planner
    planner.config, planner.facts, planner.page_size = None, EngineFacts(None, ("it is not activated",)), None
    reply = call(engine, "GetCapabilities", pb.GetCapabilitiesRequest())
    assert (reply.star_available, list(reply.star_refusals)) == (False, ["it is not activated"])
    assert not reply.HasField("star_defaults")
    assert not reply.HasField("kv_page_tokens")


def test_lora():
    engine = FakeEngine("a")
    request = pb.GenerateRequest(text="p", lora_name="sql")
    code, text, fields = refusal(engine, "Generate", request)
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["lora_name"])
    assert "it has none" in text
    models = Models(lora_requests={"sql": "the adapter"})
    front_state(engine).set_serving_models(models)
    call(engine, "Generate", request)
    call(engine, "Generate", pb.GenerateRequest(text="p"))
    assert [call.lora for call in engine.calls] == ["the adapter", None]
    assert "it has sql" in refusal(engine, "Generate", pb.GenerateRequest(text="p", lora_name=""))[1]


def test_priority_needs_a_scheduler_that_uses_it():
    engine = FakeEngine("a")
    urgent = pb.GenerateRequest(text="p", priority=-1)
    code, text, fields = refusal(engine, "Generate", urgent)
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["priority"])
    assert "--scheduling-policy priority" in text
    call(engine, "Generate", pb.GenerateRequest(text="p", priority=0))
    engine.vllm_config.scheduler_config.policy = "priority"
    call(engine, "Generate", urgent)
    assert [call.priority for call in engine.calls] == [0, -1]


def test_text_fields_need_a_tokenizer():
    engine = FakeEngine("a")
    engine.tokenizer = None
    sampling = pb.SamplingParams(bad_words=["x"])
    code, text, fields = refusal(engine, "Generate", pb.GenerateRequest(text="p", sampling=sampling))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["sampling.bad_words"])
    assert "--skip-tokenizer-init" in text


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (VLLMValidationError("Failed to transform json schema into a grammar"), "sampling.structured_outputs.regex"),
        (VLLMValidationError("out-of-vocab", parameter="logit_bias"), "sampling.logit_bias"),
    ],
    ids=["unnamed", "named"],
)
def test_a_refused_form_is_named(error, field):
    sampling = pb.SamplingParams(structured_outputs=pb.StructuredOutputs(regex="("))
    _, _, fields = refusal(FakeEngine(error), "Generate", pb.GenerateRequest(text="p", sampling=sampling))
    assert fields == [field]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"token_ids": pb.TokenIds(ids=[999])}, "token_ids"),
        ({"text": "p", "sampling": pb.SamplingParams(n=0)}, "sampling.n"),
        ({"text": "p", "sampling": pb.SamplingParams(max_tokens=1001)}, "sampling.max_tokens"),
        ({"text": "p", "sampling": pb.SamplingParams(max_tokens=2**32 - 1)}, "sampling.max_tokens"),
        ({"text": "p", "sampling": pb.SamplingParams(n=2, temperature=0)}, "sampling.n"),
        ({"text": "p", "sampling": pb.SamplingParams(logprobs=-2)}, "sampling.logprobs"),
        ({"text": "p", "sampling": pb.SamplingParams(bad_words=[""])}, "sampling.bad_words"),
        ({"text": "p", "sampling": pb.SamplingParams(extra_args='{"star": 1}')}, "sampling.extra_args"),
        ({"text": "p", "sampling": pb.SamplingParams(logit_bias={1: 999})}, "sampling.logit_bias"),
        ({"chat": pb.Chat()}, "chat"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(fields, named):
    """The context of the fake engine has 1000 tokens."""
    code, _, got = refusal(FakeEngine(), "Generate", pb.GenerateRequest(**fields))
    assert (code, got) == (grpc.StatusCode.INVALID_ARGUMENT, [named])


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (VLLMValidationError(NO_GRAMMAR), grpc.StatusCode.INVALID_ARGUMENT),
        (result(output("", finish_reason="error")), grpc.StatusCode.INTERNAL),
    ],
    ids=["of the constraint", "without a reason"],
)
def test_an_error_of_the_engine(end, code):
    """The first is what the plugin makes of the second where the request has a constraint (test_constraints.py)."""
    form = pb.StructuredOutputs(regex="(")
    engine = FakeEngine("", end)
    request = pb.GenerateRequest(text="p", sampling=pb.SamplingParams(structured_outputs=form))
    got, _, fields = refusal(engine, "Generate", request)
    assert got == code
    assert fields == (["sampling.structured_outputs.regex"] if code is grpc.StatusCode.INVALID_ARGUMENT else [])
