"""One `starling serve` process: gRPC's other calls and fields, held against HTTP, and vLLM's benchmark over gRPC."""

import json
import re
import subprocess
import sys

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from starling.v1 import inference_pb2 as pb
from tests.e2e.serving import (
    LONG,
    MODEL,
    PAGE_SIZE,
    PROMPT,
    STAR,
    body,
    options,
    request,
    running,
)
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]


def unary(star: pb.StarOptions | None = None, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest.FromString(request(star, **fields).SerializeToString())


def greedy(**fields) -> pb.SamplingParams:
    return pb.SamplingParams(**{"temperature": 0, "max_tokens": 8} | fields)


def test_generate_and_its_stream_give_the_same_choices(stub):
    sampling = pb.SamplingParams(n=3, temperature=1, seed=7, max_tokens=16, ignore_eos=True, logprobs=2)
    whole = stub.Generate(unary(sampling=sampling, cache_salt="n-whole"))
    streamed: dict[int, tuple[str, list[int], int]] = {index: ("", [], 0) for index in range(3)}
    usage = pb.Usage()
    for event in stub.GenerateStream(request(sampling=sampling, cache_salt="n-stream")):
        if event.HasField("delta"):
            text, tokens, logprobs = streamed[event.delta.index]
            tokens = [*tokens, *event.delta.token_ids]
            streamed[event.delta.index] = (text + event.delta.text, tokens, logprobs + len(event.delta.logprobs))
        else:
            usage.prompt_tokens += event.final.usage.prompt_tokens
            usage.completion_tokens += event.final.usage.completion_tokens
    assert streamed == {
        choice.index: (choice.text, list(choice.token_ids), len(choice.logprobs)) for choice in whole.choices
    }
    assert len({text for text, _, _ in streamed.values()}) == 3
    for used in (usage, whole.usage):
        assert (used.prompt_tokens, used.completion_tokens) == (701, 48)


def test_dense_heads_over_both_fronts(http, stub):
    """A quarter of 12 heads: those of the last three layers with a positive score. All of them: dense attention."""
    path, sent = "/v1/completions", {}
    for share in (0.0, 0.25, 1.0):
        xargs = STAR | {"star_dense_heads": share}
        response = http.post(path, json=body(path, xargs=xargs, ignore_eos=True, return_token_ids=True))
        plan = json.loads(response.headers["x-starling-plan"])
        whole = stub.Generate(unary(options(xargs), sampling=greedy(max_tokens=16, ignore_eos=True)))
        sent[share] = whole.choices[0].token_ids
        assert sent[share] == response.json()["choices"][0]["token_ids"]
        assert plan["dense_heads"] == whole.plan.dense_heads == share
        assert plan["keys_attended"] == whole.plan.keys_attended
        assert (plan["keys_attended"] == plan["dense_keys"]) == (share == 1)
    dense = stub.Generate(unary(sampling=greedy(max_tokens=16, ignore_eos=True)))
    assert sent[1.0] == dense.choices[0].token_ids
    assert sent[0.0] != sent[0.25] != sent[1.0]


def test_grpc_gives_the_logprobs_of_http(http, stub):
    fields = {"logprobs": 3, "prompt_logprobs": 2, "max_tokens": 4, "ignore_eos": True}
    (choice,) = http.post("/v1/completions", json=body("/v1/completions", **fields)).json()["choices"]
    reply = stub.Generate(unary(sampling=greedy(**fields)))
    (own,) = reply.choices
    logprobs = [entry.chosen.logprob for entry in own.logprobs]
    assert logprobs == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)
    assert [len(entry.top) for entry in own.logprobs] == [3] * 4
    assert [entry.top[0].token_id for entry in own.logprobs] == list(own.token_ids), "greedy"
    assert len(reply.prompt_logprobs.tokens) == len(choice["prompt_logprobs"]) == 701
    ids = stub.Tokenize(pb.TokenizeRequest(text=PROMPT)).token_ids
    for position, entry in enumerate(reply.prompt_logprobs.tokens[1:], 1):
        same = choice["prompt_logprobs"][position][str(ids[position])]
        assert (entry.chosen.token_id, entry.chosen.rank) == (ids[position], same["rank"])
        assert entry.chosen.logprob == pytest.approx(same["logprob"], abs=1e-4)
    assert not reply.prompt_logprobs.tokens[0].HasField("chosen")


def test_prompt_logprobs_of_a_star_prompt_are_those_of_star_attention(stub):
    sampling = greedy(prompt_logprobs=0)
    dense, star = (stub.Generate(unary(chosen, sampling=sampling)) for chosen in (None, options(STAR)))
    assert star.plan.attention == pb.Plan.ATTENTION_STAR
    both = [[entry.chosen.logprob for entry in reply.prompt_logprobs.tokens[1:]] for reply in (dense, star)]
    assert both[0][:127] == pytest.approx(both[1][:127], abs=1e-3), "the first block sees what dense attention sees"
    assert both[0][127:] != pytest.approx(both[1][127:], abs=1e-3)


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"regex": "(ab|cd){3}"}, lambda text: re.fullmatch("(ab|cd){3}", text)),
        ({"choices": pb.Choices(choices=["yes", "no"])}, lambda text: text in ("yes", "no")),
        ({"json_schema": '{"type": "array", "items": {"type": "boolean"}, "maxItems": 2}'}, json.loads),
    ],
    ids=["regex", "choices", "schema"],
)
def test_outputs_follow_their_structure(stub, form, fits):
    sampling = greedy(structured_outputs=pb.StructuredOutputs(**form), max_tokens=64)
    (choice,) = stub.Generate(unary(sampling=sampling)).choices
    assert choice.finish_reason == pb.Final.FINISH_REASON_STOP
    assert fits(choice.text) is not False, choice.text


def test_each_sampling_field_has_an_effect(stub):
    def text(**fields) -> str:
        return stub.Generate(unary(sampling=greedy(ignore_eos=True, **fields))).choices[0].text

    (first,) = stub.Tokenize(pb.TokenizeRequest(text="a")).token_ids
    plain = text()
    assert text(logit_bias={first: 100}) == "a" * 8
    assert text(logit_bias={first: 100}, stop=["aaa"]) == ""
    assert text(logit_bias={first: 100}, stop=["aaa"], include_stop_str_in_output=True) == "aaa"
    banned = plain[0]
    assert text(bad_words=[banned])[0] != banned
    end = 256  # the byte tokenizer's only special token
    assert text(logit_bias={end: 100}) == ""
    assert text(logit_bias={end: 100}, skip_special_tokens=False) == "<|end|>" * 8
    assert text(extra_args='{"unknown": 9007199254740993}') == plain


def test_grpc_gives_the_chat_output_of_http(http, stub):
    response = http.post("/v1/chat/completions", json=body("/v1/chat/completions")).json()
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=PROMPT)])
    reply = stub.Generate(unary(text=None, chat=chat, sampling=pb.SamplingParams(temperature=0, max_tokens=16)))
    assert reply.choices[0].text == response["choices"][0]["message"]["content"]
    tokens = stub.Tokenize(pb.TokenizeRequest(chat=chat))
    assert tokens.count == reply.usage.prompt_tokens == response["usage"]["prompt_tokens"]
    assert tokens.max_model_len == 8192


def test_grpc_gives_the_token_ids_of_http(http, stub):
    response = http.post("/tokenize", json={"model": MODEL, "prompt": "ab ä"}).json()
    assert list(stub.Tokenize(pb.TokenizeRequest(text="ab ä")).token_ids) == response["tokens"]
    assert stub.Tokenize(pb.TokenizeRequest(text="x" * 9000)).count == 9000, (
        "a text longer than the context is counted too"
    )


def test_capabilities(stub):
    found = stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert (list(found.models), found.max_model_len, found.vocabulary_size) == ([MODEL], 8192, 320)
    assert (found.kv_page_tokens, found.star_available, list(found.star_refusals)) == (PAGE_SIZE, True, [])
    assert found.star_defaults.mode == pb.StarOptions.MODE_OFF


def test_a_cancelled_generate_frees_the_request(http, stub):
    call = stub.Generate.future(unary(sampling=LONG))
    assert wait_until(lambda: running(http) == 1), "the request does not run"
    call.cancel()
    assert wait_until(lambda: running(http) == 0), "a cancelled request still runs"


def test_vllms_benchmark_over_grpc_gives_the_fields_of_http(server, tmp_path):
    results = {}
    for backend, address in (("vllm", server.http), ("starling-grpc", f"http://{server.grpc}")):
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", backend]
        command += ["--base-url", address, "--model", server.model, "--served-model-name", MODEL]
        command += ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "64"]
        command += ["--num-prompts", "6", "--max-concurrency", "2", "--temperature", "0", "--disable-tqdm"]
        command += ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", backend]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        results[backend] = json.loads((tmp_path / backend).read_text())
    ours, vllms = results["starling-grpc"], results["vllm"]
    assert set(ours) == set(vllms)
    for field in ("completed", "failed", "total_output_tokens", "output_lens", "total_input_tokens"):
        assert ours[field] == vllms[field], field
    assert ours["completed"] == 6
    # 64 tokens are at most 63 gaps. A reader that is behind gets several tokens as one message.
    assert len(ours["itls"]) == 6 and all(len(gaps) <= 63 for gaps in ours["itls"]) and any(ours["itls"])
    assert all(ttft > 0 for ttft in ours["ttfts"])


def test_health_and_reflection(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "starling.v1.InferenceService"):
        response = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    message = reflection_pb2.ServerReflectionRequest(list_services="")
    (response,) = reflection.ServerReflectionInfo(iter([message]))
    listed = {service.name for service in response.list_services_response.service}
    assert {"starling.v1.InferenceService", "grpc.health.v1.Health"} <= listed
