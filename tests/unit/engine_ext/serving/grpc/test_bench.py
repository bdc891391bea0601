"""vLLM's benchmark over gRPC: what is sent, what is measured, and that `vllm bench serve` has the backend."""

import asyncio

import grpc
import pytest
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput
from vllm.exceptions import QueueOverflowError

from starling.engine_ext.serving.grpc.bench import (
    MAX_EVENT_BYTES,
    NO_TOKEN,
    metadata_of,
    request_of,
    request_starling,
)
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc
from starling.vllm_compat.bench_commands import is_bench
from tests.unit.engine_ext.serving.grpc.fakes import PROMPT_TOKENS, FakeEngine, front_of


class Session:
    """Like the HTTP session that vLLM makes for each benchmark."""


def func_input(**fields) -> RequestFuncInput:
    values = {"prompt": "abc", "api_url": "http://h:1/v1/completions", "prompt_len": 3, "output_len": 5, "model": "m"}
    return RequestFuncInput(**values | fields)


def measure(engine: FakeEngine, **fields):
    async def scenario():
        async with front_of(engine) as client:
            url = f"http://{client.address}/v1/completions"
            return await request_starling(func_input(api_url=url, **fields), Session())

    return asyncio.run(scenario())


def test_what_is_measured():
    output = measure(FakeEngine("a", "bc", "d"))
    assert (output.success, output.error) == (True, "")
    assert (output.generated_text, output.output_tokens, output.prompt_len) == ("abcd", 4, PROMPT_TOKENS)
    assert len(output.itl) == 2
    assert output.latency == pytest.approx(output.ttft + sum(output.itl))


@pytest.mark.parametrize(
    ("engine", "fields", "error"),
    [
        (FakeEngine, {"extra_body": {"temperature": 9}}, "INVALID_ARGUMENT: temperature"),
        (lambda: FakeEngine(refuses=QueueOverflowError()), {}, "RESOURCE_EXHAUSTED"),
        (FakeEngine, {"extra_body": {"best_of": 2}}, "best_of"),
        (FakeEngine, {"prompt": ["a", "b"]}, "one prompt a request"),
        (FakeEngine, {"multi_modal_content": {"image": 1}}, "text only"),
        (FakeEngine, {}, NO_TOKEN),
    ],
    ids=["bad input", "overload", "unknown field", "two prompts", "image", "no token"],
)
def test_a_failure_is_reported(engine, fields, error):
    output = measure(engine(), **fields)
    assert not output.success
    assert error in output.error


def of_another_server(answer) -> str:
    """The error of a request to a gRPC server that answers as ``answer(context)`` does."""

    class Servicer(inference_pb2_grpc.InferenceServiceServicer):
        async def GenerateStream(self, request, context):
            yield await answer(context)

    async def scenario():
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(Servicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            return await request_starling(func_input(api_url=f"http://127.0.0.1:{port}/v1/completions"), Session())
        finally:
            await server.stop(None)

    output = asyncio.run(scenario())
    assert not output.success
    return output.error


def test_an_error_of_another_server_does_not_steer_the_terminal():
    async def refuse(context):
        await context.abort(grpc.StatusCode.INTERNAL, "\x1b[31mno \x9b2J\u202eway\x07" + "\x1b[2J" * 500)

    assert of_another_server(refuse) == "INTERNAL: no way"


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_an_event_above_the_bound_is_refused(compression):
    async def large(context):
        context.set_compression(compression)
        return pb.GenerateStreamResponse(delta=pb.Delta(text="a" * MAX_EVENT_BYTES))

    error = of_another_server(large)
    assert error.startswith("RESOURCE_EXHAUSTED")
    assert str(MAX_EVENT_BYTES) in error


def test_what_is_sent():
    body = {"temperature": 0.5, "cache_salt": "s", "vllm_xargs": {"star": "auto", "star_block_size": 64}}
    sent = request_of(func_input(ignore_eos=True, logprobs=1, extra_body=body, request_id="r"))
    sampling = pb.SamplingParams(max_tokens=5, repetition_penalty=1, ignore_eos=True, logprobs=1, temperature=0.5)
    star = pb.StarOptions(mode=pb.StarOptions.MODE_AUTO, block_size="64")
    assert sent == pb.GenerateStreamRequest(text="abc", sampling=sampling, star=star, cache_salt="s", request_id="r")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"prompt": [1, 2]}, "token_ids"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "chat"),
        ({"chat_messages": [{"role": "user", "content": "hi"}]}, "chat"),
    ],
    ids=["token ids", "messages as prompt", "messages"],
)
def test_kinds_of_prompt(fields, kind):
    assert request_of(func_input(**fields)).WhichOneof("prompt") == kind


def test_metadata(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert metadata_of(func_input()) == ()
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    got = metadata_of(func_input(extra_headers={"X-A": "b"}))
    assert got == (("authorization", "Bearer key"), ("x-a", "b"))


@pytest.mark.parametrize(
    ("argv", "bench"),
    [
        (["vllm", "bench", "serve"], True),
        (["vllm", "-v", "bench"], True),
        (["vllm", "serve", "bench"], False),
        (["vllm"], False),
    ],
)
def test_only_the_benchmark_gets_the_backend(argv, bench):
    assert is_bench(argv) == bench
