"""One `starling serve` process, asked over HTTP and gRPC at once: answers, plans, refusals, metrics, shutdown."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from benchmarks.random_llama import SPECIAL
from examples.server import end_on_signals, serving
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc
from tests.e2e.models import make_tiny_llama

pytestmark = pytest.mark.e2e

PAGE = 32
MODEL = "tiny"
PROMPT = "".join(chr(ord("a") + (i * i * 7 + i // 3) % 26) for i in range(701))  # a token a character
STAR = {"star": "on", "star_block_size": 128, "star_anchor_size": 64, "star_query_tokens": 40}
NUMBERS = {
    "star_blocks": 6,
    "block_size": 128,
    "anchor_size": 64,
    "overlap_size": 0,
    "context_end": 661,
    "prompt_tokens": 701,
}
DENSE_KEYS = 701 * 702 // 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    end_on_signals()  # a test run that is killed takes its server along
    folder = tmp_path_factory.mktemp("serving")
    # Slow enough that a long output still runs when a busy machine comes to look at it.
    model = make_tiny_llama(folder / MODEL, layers=6)
    options = ["--served-model-name", MODEL, "--dtype", "float32", "--block-size", str(PAGE), "--enforce-eager"]
    # A grace for running streams that a slow machine can't use up, in the test of SIGTERM.
    options += ["--max-num-batched-tokens", "512", "--shutdown-timeout", "20", "--enable-prompt-tokens-details"]
    with serving(model, *options, log=folder / "log", seconds=300) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def generate(channel):
    return inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.http, timeout=120) as client:
        yield client


def body(path: str, *, stream: bool = False, xargs: dict | None = None, **fields) -> dict:
    """A greedy request to generate 16 tokens, in the words of each API."""
    messages = [{"role": "user", "content": PROMPT}]
    of_path = {
        "/v1/completions": {"prompt": PROMPT, "max_tokens": 16},
        "/v1/chat/completions": {"messages": messages, "max_tokens": 16},
        "/v1/responses": {"input": PROMPT, "max_output_tokens": 16},
        "/v1/messages": {"messages": messages, "max_tokens": 16},
    }
    common = {"model": MODEL, "temperature": 0, "stream": stream, "vllm_xargs": xargs or {}}
    return common | of_path[path] | fields


PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"]


def request(star: pb.StarOptions | None = None, **fields) -> pb.GenerateStreamRequest:
    sampling = pb.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    return pb.GenerateStreamRequest(**{"text": PROMPT, "sampling": sampling, "star": star} | fields)


def options(xargs: dict) -> pb.StarOptions:
    fields = {key.removeprefix("star_"): value for key, value in xargs.items() if key != "star"}
    return pb.StarOptions(mode=f"MODE_{xargs['star'].upper()}", **fields)


def read(call) -> tuple[str, list[int], pb.Final]:
    *deltas, last = call
    text = "".join(event.delta.text for event in deltas)
    return text, [token for event in deltas for token in event.delta.token_ids], last.final


def metrics(http, name: str) -> float:
    """Sum of a metric's series; 0 where there is none."""
    lines = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return sum(map(float, lines))


def eventually(condition, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_http_says_the_plan(http, path, stream):
    with http.stream("POST", path, json=body(path, stream=stream, xargs=STAR)) as response:
        response.read()
    assert response.status_code == 200, response.text
    plan = json.loads(response.headers["x-starling-plan"])
    prompt_tokens = plan["prompt_tokens"]  # a chat template adds its own
    assert prompt_tokens >= 701
    expected = NUMBERS | {"prompt_tokens": prompt_tokens, "context_end": prompt_tokens - 40}
    assert {name: plan[name] for name in NUMBERS} == expected
    assert plan["attention"] == "star"
    assert plan["keys_attended"] < plan["dense_keys"] == prompt_tokens * (prompt_tokens + 1) // 2


def test_http_says_dense(http):
    response = http.post("/v1/completions", json=body("/v1/completions"))
    assert json.loads(response.headers["x-starling-plan"]) == {
        "attention": "dense",
        "prompt_tokens": 701,
        "padding_tokens": 0,
    }


@pytest.mark.parametrize("star", [None, STAR], ids=["dense", "star"])
def test_grpc_equals_http(http, generate, star):
    path = "/v1/completions"
    answer = http.post(path, json=body(path, xargs=star, ignore_eos=True, return_token_ids=True)).json()
    choice = answer["choices"][0]
    text, tokens, final = read(generate(request(star and options(star))))
    assert tokens == choice["token_ids"]
    assert text == choice["text"]
    assert final.finish_reason == pb.Final.FINISH_REASON_LENGTH
    assert (final.usage.prompt_tokens, final.usage.completion_tokens) == (701, 16)
    if star is None:
        assert final.plan.attention == pb.Plan.ATTENTION_DENSE
        assert final.plan.keys_attended == final.plan.dense_keys == DENSE_KEYS
    else:
        assert final.plan.attention == pb.Plan.ATTENTION_STAR
        assert {name: getattr(final.plan, name) for name in NUMBERS} == NUMBERS
        assert final.plan.keys_attended < final.plan.dense_keys == DENSE_KEYS


def test_star_is_not_dense(generate):
    dense, star = (read(generate(request(options_)))[1] for options_ in (None, options(STAR)))
    assert dense != star


def test_text_and_token_ids_are_the_same_prompt(http, generate):
    tokens = http.post("/tokenize", json={"model": MODEL, "prompt": PROMPT}).json()["tokens"]
    ids = pb.GenerateStreamRequest(token_ids=pb.TokenIds(ids=tokens), sampling=request().sampling)
    assert read(generate(ids))[:2] == read(generate(request()))[:2]


def test_deltas_are_the_whole_output(http, generate):
    """With a stop string, whose possible beginnings are held back, and bytes that make no character alone."""
    # A prompt of one step: a seed with a prompt in chunks ends vLLM 0.32's engine on CPU (V1 runner).
    prompt = PROMPT[:300]
    sampling = pb.SamplingParams(temperature=1.5, seed=5, max_tokens=200, ignore_eos=True, stop=["\x02", "qz"])
    text, tokens, final = read(generate(request(text=prompt, sampling=sampling)))
    fields = {
        "temperature": 1.5,
        "seed": 5,
        "max_tokens": 200,
        "ignore_eos": True,
        "stop": ["\x02", "qz"],
        "prompt": prompt,
    }
    path = "/v1/completions"
    choice = http.post(path, json=body(path, return_token_ids=True, **fields)).json()["choices"][0]
    assert (text, tokens) == (choice["text"], choice["token_ids"])
    assert final.usage.completion_tokens == len(tokens)
    assert (final.stop_string or None) == choice["stop_reason"]


def test_cached_tokens(generate):
    salted = request(cache_salt="test-cached")
    assert read(generate(salted))[2].usage.cached_tokens == 0
    assert read(generate(salted))[2].usage.cached_tokens == 701 // PAGE * PAGE
    assert read(generate(request(cache_salt="another")))[2].usage.cached_tokens == 0


BAD = {
    "unknown": ({"star_blok": 128}, ["star_blok", "128", "no such star option", "star_block_size"]),
    "text": ({"star_block_size": "big"}, ["star_block_size", "big", "whole number", "multiple of the KV page"]),
    "list": ({"star_block_size": [128]}, ["star_block_size", "128", "whole number"]),
    "true": ({"star": True}, ["star", "1", "one of off, on, auto"]),
    "off the page": ({"star": "on", "star_block_size": 100}, ["star_block_size", "100", "32 tokens", "multiple of 32"]),
    "A above B": (
        {"star": "on", "star_block_size": 64, "star_anchor_size": 128},
        ["star_anchor_size", "128", "larger than the star block of 64", "from 0 to 64"],
    ),
    "O above B": (
        {"star": "on", "star_block_size": 64, "star_overlap_size": 96},
        ["star_overlap_size", "96", "larger than the star block of 64", "from 0 to 64"],
    ),
    "long query": ({"star": "on", "star_query_tokens": 9000}, ["star_query_tokens", "9000", "prompt has only"]),
    "long context": ({"star": "on", "star_context_tokens": 9000}, ["star_context_tokens", "9000", "prompt has only"]),
    "negative": ({"star_query_tokens": -1}, ["star_query_tokens", "-1", "0 or more"]),
    "both ends": (
        {"star_query_tokens": 8, "star_context_tokens": 8},
        ["star_context_tokens", "8", "star_query_tokens=8 says the same"],
    ),
    "mark not there": (
        {"star": "on", "star_block_size": 64, "star_segment_token": 256},
        ["star_segment_token", "256", "does not occur in the context", "starts the prompt's segments"],
    ),
    "padding alone": (
        {"star": "on", "star_padding_token": 7},
        ["star_padding_token", "7", "without star_segment_token"],
    ),
    "no token": (
        {"star": "on", "star_block_size": 64, "star_segment_token": 84, "star_padding_token": 9999},
        ["star_padding_token", "9999", "vocabulary has 320", "0 to 319"],
    ),
    "nested": ({"star": {"block_size": 64}}, ["vllm_xargs"]),  # vLLM's own refusal
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_a_bad_option_is_a_400(http, path, stream, bad):
    xargs, says = BAD[bad]
    response = http.post(path, json=body(path, stream=stream, xargs=xargs))
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert all(part in message for part in says), message
    assert http.get("/health").status_code == 200


ONE_OF_EACH = ["off the page", "A above B", "O above B", "long query", "long context", "mark not there", "no token"]


@pytest.mark.parametrize("bad", ONE_OF_EACH)
def test_a_bad_option_is_invalid_argument(generate, bad):
    xargs, says = BAD[bad]
    with pytest.raises(grpc.RpcError) as refused:
        read(generate(request(options(xargs))))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert all(part in refused.value.details() for part in says)
    details = error_details_pb2.BadRequest()
    assert rpc_status.from_call(refused.value).details[0].Unpack(details)
    assert [violation.field for violation in details.field_violations] == [says[0].replace("_", ".", 1)]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"star": pb.StarOptions(mode=9)}, "star.mode"),
        ({"text": ""}, "text"),
        ({"text": "x" * 9000}, "text"),
        ({"text": "x" * 8192}, "text"),
        ({"text": None, "token_ids": pb.TokenIds(ids=[9999])}, "token_ids"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        ({"sampling": pb.SamplingParams(top_p=2)}, "sampling.top_p"),
        ({"sampling": pb.SamplingParams(max_tokens=0)}, "sampling.max_tokens"),
        ({"sampling": pb.SamplingParams(stop_token_ids=[9999])}, "sampling.stop_token_ids"),
        ({"sampling": pb.SamplingParams(n=2, temperature=0)}, "sampling.n"),
        ({"sampling": pb.SamplingParams(logprobs=21)}, "sampling.logprobs"),
        ({"sampling": pb.SamplingParams(prompt_logprobs=21)}, "sampling.prompt_logprobs"),
        ({"sampling": pb.SamplingParams(logit_bias={9999: 1})}, "sampling.logit_bias"),
        ({"sampling": pb.SamplingParams(extra_args='{"star": "on"}')}, "sampling.extra_args"),
        ({"sampling": {"structured_outputs": {"regex": "("}}}, "sampling.structured_outputs.regex"),
        ({"sampling": {"structured_outputs": {"json_schema": "{"}}}, "sampling.structured_outputs.json_schema"),
        ({"sampling": {"structured_outputs": {"json_schema": ""}}}, "sampling.structured_outputs.json_schema"),
        (
            {"sampling": {"structured_outputs": {"json_schema": '{"type": "string", "minLength": -1}'}}},
            "sampling.structured_outputs.json_schema",
        ),
        ({"lora_name": "none"}, "lora_name"),
        ({"priority": 1}, "priority"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_bad_input_is_invalid_argument(generate, fields, field):
    with pytest.raises(grpc.RpcError) as refused:
        read(generate(request(**fields)))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = error_details_pb2.BadRequest()
    assert rpc_status.from_call(refused.value).details[0].Unpack(details)
    assert [violation.field for violation in details.field_violations] == [field]


def test_the_server_still_answers(http, generate):
    assert http.post("/v1/completions", json=body("/v1/completions", xargs=STAR)).status_code == 200
    assert len(read(generate(request(options(STAR))))[1]) == 16


LONG = pb.SamplingParams(temperature=0, max_tokens=7000, ignore_eos=True)


def test_cancel_frees_the_request(http, generate):
    generated = metrics(http, "vllm:generation_tokens_total")
    call = generate(request(sampling=LONG, request_id="long"))
    next(call)
    eventually(lambda: metrics(http, "vllm:num_requests_running") == 1, "the request does not run")
    with pytest.raises(grpc.RpcError) as refused:
        next(generate(request(request_id="long")))
    assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
    call.cancel()
    eventually(lambda: metrics(http, "vllm:num_requests_running") == 0, "a cancelled request still runs")
    assert metrics(http, "vllm:generation_tokens_total") - generated < LONG.max_tokens
    assert len(read(generate(request(request_id="long")))[1]) == 16


def test_a_lost_client_frees_the_request(server, http):
    code = (
        "import sys, grpc; from starling.v1 import inference_pb2 as pb, inference_pb2_grpc as stubs\n"
        "channel = grpc.insecure_channel(sys.argv[1])\n"
        "stub = stubs.InferenceServiceStub(channel)\n"
        "sampling = pb.SamplingParams(max_tokens=7000, ignore_eos=True)\n"
        "for _ in stub.GenerateStream(pb.GenerateStreamRequest(text='abc', sampling=sampling)): pass\n"
    )
    generated = metrics(http, "vllm:generation_tokens_total")
    client = subprocess.Popen([sys.executable, "-c", code, server.grpc])
    try:
        eventually(lambda: metrics(http, "vllm:num_requests_running") == 1, "the request does not run")
    finally:
        client.kill()
        client.wait()
    eventually(lambda: metrics(http, "vllm:num_requests_running") == 0, "its request still runs")
    assert metrics(http, "vllm:generation_tokens_total") - generated < LONG.max_tokens


@pytest.fixture(scope="module")
def stub(channel):
    return inference_pb2_grpc.InferenceServiceStub(channel)


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


def test_logprobs_are_those_of_http(http, stub):
    fields = {"logprobs": 3, "prompt_logprobs": 2, "max_tokens": 4, "ignore_eos": True}
    (choice,) = http.post("/v1/completions", json=body("/v1/completions", **fields)).json()["choices"]
    reply = stub.Generate(unary(sampling=greedy(**fields)))
    (own,) = reply.choices
    told = [entry.chosen.logprob for entry in own.logprobs]
    assert told == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)
    assert [len(entry.top) for entry in own.logprobs] == [3] * 4
    assert [entry.top[0].token_id for entry in own.logprobs] == list(own.token_ids), "greedy"
    assert len(reply.prompt_logprobs.tokens) == len(choice["prompt_logprobs"]) == 701
    ids = stub.Tokenize(pb.TokenizeRequest(text=PROMPT)).token_ids
    for position, entry in enumerate(reply.prompt_logprobs.tokens[1:], 1):
        same = choice["prompt_logprobs"][position][str(ids[position])]
        assert (entry.chosen.token_id, entry.chosen.rank) == (ids[position], same["rank"])
        assert entry.chosen.logprob == pytest.approx(same["logprob"], abs=1e-4)
    assert not reply.prompt_logprobs.tokens[0].HasField("chosen")


def test_prompt_logprobs_of_a_star_prompt_are_its_own(stub):
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
def test_structured_outputs(stub, form, fits):
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


def test_chat_is_that_of_http(http, stub):
    answer = http.post("/v1/chat/completions", json=body("/v1/chat/completions")).json()
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=PROMPT)])
    reply = stub.Generate(unary(text=None, chat=chat, sampling=pb.SamplingParams(temperature=0, max_tokens=16)))
    assert reply.choices[0].text == answer["choices"][0]["message"]["content"]
    tokens = stub.Tokenize(pb.TokenizeRequest(chat=chat))
    assert tokens.count == reply.usage.prompt_tokens == answer["usage"]["prompt_tokens"]
    assert tokens.max_model_len == 8192


def test_tokenize_is_that_of_http(http, stub):
    told = http.post("/tokenize", json={"model": MODEL, "prompt": "ab ä"}).json()
    assert list(stub.Tokenize(pb.TokenizeRequest(text="ab ä")).token_ids) == told["tokens"]
    assert stub.Tokenize(pb.TokenizeRequest(text="x" * 9000)).count == 9000, "counted, though beyond the context"


def test_capabilities(stub):
    told = stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert (list(told.models), told.max_model_len, told.vocabulary_size) == ([MODEL], 8192, 320)
    assert (told.kv_page_tokens, told.star_available, list(told.star_refusals)) == (PAGE, True, [])
    assert told.star_defaults.mode == pb.StarOptions.MODE_OFF


def test_a_cancelled_generate_frees_the_request(http, stub):
    call = stub.Generate.future(unary(sampling=LONG))
    eventually(lambda: metrics(http, "vllm:num_requests_running") == 1, "the request does not run")
    call.cancel()
    eventually(lambda: metrics(http, "vllm:num_requests_running") == 0, "a cancelled request still runs")


def test_vllms_benchmark_over_grpc_gives_the_fields_of_http(server, tmp_path):
    results = {}
    for backend, address in (("vllm", server.http), ("starling-grpc", f"http://{server.grpc}")):
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", backend]
        command += ["--base-url", address, "--model", server.model, "--served-model-name", MODEL]
        command += ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16"]
        command += ["--num-prompts", "6", "--max-concurrency", "2", "--temperature", "0", "--disable-tqdm"]
        command += ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", backend]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        results[backend] = json.loads((tmp_path / backend).read_text())
    ours, vllms = results["starling-grpc"], results["vllm"]
    assert set(ours) == set(vllms)
    for field in ("completed", "failed", "total_output_tokens", "output_lens", "total_input_tokens"):
        assert ours[field] == vllms[field], field
    assert ours["completed"] == 6
    assert [len(gaps) for gaps in ours["itls"]] == [15] * 6
    assert all(ttft > 0 for ttft in ours["ttfts"])


def test_health_and_reflection(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "starling.v1.InferenceService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection.ServerReflectionInfo(iter([asked]))
    listed = {service.name for service in answer.list_services_response.service}
    assert {"starling.v1.InferenceService", "grpc.health.v1.Health"} <= listed


def example(name: str, *arguments: str) -> str:
    """What a program of examples/ prints."""
    script = Path(__file__).resolve().parents[2] / "examples" / name
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_grpc_example(server, generate):
    printed = example("grpc_stream.py", PROMPT, "--address", server.grpc, "--star-block-size", "128")
    assert "attention: ATTENTION_STAR" in printed
    assert "block_size: 128" in printed


def test_the_openai_example(server):
    printed = example("openai_client.py", PROMPT, "--url", server.http, "--star-block-size", "128")
    plan = json.loads(re.search(r"x-starling-plan: (.*)", printed)[1])
    assert (plan["attention"], plan["block_size"]) == ("star", 128)


def test_the_edit_example_computes_one_block(server, http):
    documents = ("--documents", "6", "--characters", "90", "--mark", SPECIAL)
    arguments = ("--block", "128", *documents, "--edit", "3", "--turns", "1")
    first, second = example("edit_document.py", "--url", server.http, *arguments).splitlines()
    tokens, longer = (int(re.search(r"of (\d+) prompt tokens", line)[1]) for line in (first, second))
    assert int(re.search(r"(\d+) of", first)[1]) < 128
    # Computed are the edited document's last page, the question, and the page where it starts: nothing has moved.
    assert longer == tokens > 5 * 128
    assert longer - int(re.search(r"(\d+) of", second)[1]) < 2 * PAGE + len("\n\nWhat are these files about?\n")
    text = http.get("/metrics").text
    assert float(re.search(r'^starling:cached_tokens_total\{kind="block"\} (\S+)$', text, re.MULTILINE)[1]) >= 2 * 128


def test_an_aligned_prompt_is_answered_as_the_padded_one(http, generate):
    """Over both fronts: the tokens of the prompt that the client could have padded itself, and their logprobs."""
    (space,) = http.post("/tokenize", json={"prompt": " ", "add_special_tokens": False}).json()["tokens"]
    mark, given = 256, [[256, *[token] * size] for token, size in ((65, 70), (66, 40), (67, 100))]
    padded = [token for segment in given for token in segment + [space] * (-len(segment) % 64)]
    ids, question = [token for segment in given for token in segment], [68] * 9
    star = {"star": "on", "star_block_size": 64, "star_query_tokens": 9}
    end = len(padded) - (-len(given[-1]) % 64)
    shared = {"model": MODEL, "max_tokens": 4, "temperature": 0, "logprobs": 2, "prompt_logprobs": 1}

    def complete(prompt, **options):
        asked = shared | {"prompt": prompt, "vllm_xargs": star | options, "cache_salt": str(options)}
        response = http.post("/v1/completions", json=asked)
        return response.json()["choices"][0], json.loads(response.headers["x-starling-plan"]), response.json()["usage"]

    by_hand, plan, usage = complete(padded[:end] + question)
    aligned, aligned_plan, aligned_usage = complete(ids + question, star_segment_token=mark)
    assert aligned_usage == usage
    assert aligned_plan == plan | {"padding_tokens": end - len(ids)}
    assert aligned["text"] == by_hand["text"]
    assert aligned["logprobs"]["token_logprobs"] == pytest.approx(by_hand["logprobs"]["token_logprobs"], abs=1e-5)
    assert len(aligned["prompt_logprobs"]) == usage["prompt_tokens"] == end + 9

    options = pb.StarOptions(mode=pb.StarOptions.MODE_ON, block_size=64, query_tokens=9, segment_token=mark)
    sampling = pb.SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=1)
    asked = request(options, text=None, token_ids=pb.TokenIds(ids=ids + question), sampling=sampling, cache_salt="grpc")
    events = list(generate(asked))
    logprobs = next(event.prompt_logprobs for event in events if event.HasField("prompt_logprobs"))
    final = events[-1].final
    assert (final.plan.padding_tokens, final.usage.prompt_tokens) == (end - len(ids), end + 9)
    assert len(logprobs.tokens) == end + 9


def test_metrics_move(http, generate):
    names = [f'starling:requests_total{{attention="{attention}"}}' for attention in ("dense", "star")]
    names += ["starling:context_tokens_total", "starling:keys_attended_total", "starling:keys_dense_total"]
    names += ['starling:plan_rejections_total{option="star_block_size"}']

    def values() -> list[float]:
        text = http.get("/metrics").text
        found = [re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE) for name in names]
        return [float(match[1]) if match else 0.0 for match in found]

    before = values()
    read(generate(request(cache_salt="metrics")))
    _, _, final = read(generate(request(options(STAR), cache_salt="metrics-star")))
    with pytest.raises(grpc.RpcError):
        read(generate(request(options({"star": "on", "star_block_size": 100}))))
    dense, star, tokens, attended, dense_keys, rejected = (
        after - was for after, was in zip(values(), before, strict=True)
    )
    assert (dense, star, rejected) == (1, 1, 1)
    assert 0 < tokens <= 661
    assert 0 < attended < dense_keys < final.plan.dense_keys


def test_sigterm_lets_streams_end_and_exits_with_0(server, channel, generate):
    """Last in this file: it ends the server."""
    health = health_pb2_grpc.HealthStub(channel)

    def status() -> int:
        return health.Check(health_pb2.HealthCheckRequest()).status

    sampling = pb.SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    call = generate(request(sampling=sampling))
    first = next(call)
    server.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    eventually(lambda: status() == health_pb2.HealthCheckResponse.NOT_SERVING, "still SERVING", 5)
    with pytest.raises(grpc.RpcError) as refused:
        next(generate(request()))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    _, tokens, final = read(call)
    assert len(first.delta.token_ids) + len(tokens) == final.usage.completion_tokens == 1500
    assert server.process.wait(30) == 0
    assert time.monotonic() - started < 30
