"""SMG over gRPC and vllm-router over HTTP, each in front of two servers; and VllmEngine by itself."""

import hashlib
import itertools
import json
import signal
import subprocess
import sys
import zipfile
from contextlib import ExitStack, suppress
from io import BytesIO
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as engine_pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from benchmarks.gateway_process import DOCUMENT_ROUTER, SMG, VLLM_ROUTER, gateway_before, is_installed
from benchmarks.random_llama import make_tiny_llama
from examples.server import free_ports, serving
from starling.v1 import admin_pb2, admin_pb2_grpc
from tests.e2e.serving import MODEL, NO_REUSE, metrics, running
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

ADMIN_KEY, PAGE, BLOCK = "key-of-the-operator", 32, 256
GATEWAYS = [
    pytest.param(name, marks=pytest.mark.skipif(not is_installed(name), reason=f"there is no wheel of {name} here"))
    for name in (SMG, VLLM_ROUTER)
]
ENDLESS = {"max_tokens": 12000, "ignore_eos": True}
GATEWAY_SERVICE = "vllm.grpc.engine.VllmEngine"
OPERATOR = [("authorization", f"Bearer {ADMIN_KEY}")]

_numbers = itertools.count(1)


def new_prompt(length: int = 2001) -> str:
    """A text of so many tokens that has no page in common with those before."""
    return hashlib.shake_256(str(next(_numbers)).encode()).hexdigest(length)[:length]


class Fleet:
    """Two servers, and clients of each."""

    def __init__(self, servers, stack: ExitStack) -> None:
        self.servers = servers
        self.http = [
            stack.enter_context(httpx.Client(base_url=server.http, timeout=300, limits=NO_REUSE)) for server in servers
        ]
        self.channels = [stack.enter_context(grpc.insecure_channel(server.grpc)) for server in servers]

    def count(self, name: str) -> list[float]:
        return [metrics(http, name) for http in self.http]

    def running(self) -> float:
        return sum(running(http) for http in self.http)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateways")
    model = make_tiny_llama(folder / MODEL, max_position_embeddings=16384)
    ports = free_ports(0, 0)
    options = ["--served-model-name", MODEL, "--dtype", "float32", "--block-size", str(PAGE), "--enforce-eager"]
    options += ["--max-num-batched-tokens", "256", "--enable-prompt-tokens-details", "--grpc-admin-key", ADMIN_KEY]
    options += ["--star", "on", "--star-block-size", str(BLOCK), "--star-segments", "|"]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serving(model, *options, log=folder / f"log{number}", grpc_port=port))
            for number, port in enumerate(ports)
        ]
        fleet = Fleet(servers, stack)
        assert fleet.count("vllm:prompt_tokens_total") == [0, 0], "the package's own warm-up is off"
        yield fleet


@pytest.fixture(scope="module")
def gateways(fleet, tmp_path_factory):
    """Name -> client of a gateway, started where a test first asks for it."""
    folder = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:

        class Started(dict):
            def __missing__(self, name: str) -> httpx.Client:
                url = stack.enter_context(gateway_before(name, fleet.servers, folder / name))
                self[name] = stack.enter_context(httpx.Client(base_url=url, timeout=300, limits=NO_REUSE))
                return self[name]

        yield Started()


def complete(http: httpx.Client, prompt: str, **fields) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json=body | fields)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def streamed(http: httpx.Client, path: str, **fields) -> str:
    """The text of a streamed response."""
    body = {"model": MODEL, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "stream": True}
    with http.stream("POST", path, json=body | fields) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@pytest.mark.parametrize("name", GATEWAYS)
def test_completions_and_chats_are_those_of_a_server(gateways, fleet, name):
    gateway, star = gateways[name], sum(fleet.count("starling:requests_total"))
    prompt = new_prompt()
    (expected,) = {text_of(complete(http, prompt)) for http in fleet.http}  # both servers have the prompt cached now
    response = complete(gateway, prompt)
    assert text_of(response) == expected
    assert streamed(gateway, "/v1/completions", prompt=prompt) == expected
    chat = {"messages": [{"role": "user", "content": prompt}]}
    assert streamed(gateway, "/v1/chat/completions", **chat) == streamed(fleet.http[1], "/v1/chat/completions", **chat)
    assert sum(fleet.count("starling:requests_total")) - star == 6
    if name == VLLM_ROUTER:
        assert json.loads(response.headers["x-starling-plan"])["star_blocks"] == 6
    else:
        assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 5 * BLOCK


@pytest.mark.parametrize("name", GATEWAYS)
def test_the_requests_have_star_plans_on_both_servers(gateways, fleet, name):
    gateway, before = gateways[name], fleet.count("starling:keys_attended_total")
    for _ in range(2):
        text_of(complete(gateway, new_prompt()))
    dense = 2001 * 2002 // 2
    attended = [now - then for now, then in zip(fleet.count("starling:keys_attended_total"), before, strict=True)]
    assert all(attended)
    assert sum(attended) < 2 * 0.75 * dense


@pytest.mark.parametrize("name", GATEWAYS)
def test_a_client_that_leaves_ends_its_request(gateways, fleet, name):
    for http in fleet.http:  # vLLM's gauge of running requests is that of the last step
        text_of(complete(http, new_prompt(50), vllm_xargs={"star": "off"}))
    assert wait_until(lambda: fleet.running() == 0)
    body = {"model": MODEL, "prompt": new_prompt(200), "temperature": 0, "stream": True, **ENDLESS}
    with gateways[name].stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # httpx closes the connection once nothing holds this
        next(lines)
        assert wait_until(lambda: fleet.running() == 1)
    assert wait_until(lambda: fleet.running() == 0)


@pytest.mark.parametrize("name", GATEWAYS)
def test_vllms_benchmark_runs_through_it(gateways, fleet, name, tmp_path):
    url = str(gateways[name].base_url).rstrip("/")
    command = [Path(sys.executable).with_name("vllm"), "bench", "serve", "--base-url", url, "--model", MODEL]
    command += ["--tokenizer", fleet.servers[0].model, "--dataset-name", "random", "--num-prompts", "4"]
    command += ["--random-input-len", "600", "--random-output-len", "4", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", tmp_path, "--result-filename", "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["completed"] == 4


class TestVllmEngine:
    """The service without a gateway."""

    @pytest.fixture
    def stub(self, fleet):
        return vllm_engine_pb2_grpc.VllmEngineStub(fleet.channels[0])

    def request(self, prompt: str = "", **fields) -> engine_pb.GenerateRequest:
        sampling = engine_pb.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        fields = {"request_id": f"request-{next(_numbers)}", "sampling_params": sampling} | fields
        return engine_pb.GenerateRequest(**({"text": prompt} if prompt else {}) | fields)

    def refusal(self, call) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as raised:
            list(call) if hasattr(call, "__iter__") else call
        return raised.value.code(), raised.value.details()

    def test_health_and_reflection_list_it(self, fleet):
        health = health_pb2_grpc.HealthStub(fleet.channels[0])
        status = health.Check(health_pb2.HealthCheckRequest(service=GATEWAY_SERVICE)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(fleet.channels[0])
        (answer,) = stub.ServerReflectionInfo(iter([listing]))
        assert GATEWAY_SERVICE in {service.name for service in answer.list_services_response.service}

    def test_the_answers_metadata_has_the_plan(self, fleet, stub):
        prompt = new_prompt()
        call = stub.Generate(self.request(prompt))
        (answer,) = call
        plan = json.loads(dict(call.trailing_metadata())["x-starling-plan"])
        assert plan["star_blocks"] == 6
        again = stub.Generate(self.request(tokenized=engine_pb.TokenizedInput(input_ids=_ids(fleet, prompt))))
        assert [response.complete.output_ids for response in again] == [answer.complete.output_ids]
        assert answer.complete.prompt_tokens == 2001

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"tokenized": engine_pb.TokenizedInput(input_ids=[1] * 20000)}, "the model's context has 16384"),
            ({"request_id": "x" * 300}, "request_id is refused"),
            ({"request_id": ""}, "request_id is empty"),
            ({"mm_inputs": engine_pb.MultimodalInputs()}, "mm_inputs is refused: this service takes text only"),
            (
                {"media_refs": engine_pb.MediaRefs(items=[engine_pb.MediaRef(url="http://127.0.0.1/")])},
                "media_refs is refused",
            ),
            ({"kv_transfer_params_json": "[1]"}, "kv_transfer_params"),
            ({"kv_transfer_params_json": '{"a":[' + "[]," * 50_000 + "0]}"}, "kv_transfer_params_json is refused"),
            ({"tokenized": engine_pb.TokenizedInput(input_ids=[1], original_text="x" * 10**6)}, "1000000 characters"),
            ({"sampling_params": engine_pb.SamplingParams(stop=["x"] * 300)}, "stop is refused"),
            ({"sampling_params": engine_pb.SamplingParams(n=200)}, "128"),
            (
                {"sampling_params": engine_pb.SamplingParams(truncate_prompt_tokens=5)},
                "truncate_prompt_tokens is refused",
            ),
        ],
    )
    def test_bad_requests_are_refused(self, stub, fields, text):
        given = {} if "tokenized" in fields else {"text": "abc"}
        code, details = self.refusal(stub.Generate(self.request(**given | fields)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert text in details
        assert len(details) <= 1024

    def test_a_message_that_is_none_ends_its_call(self, fleet):
        raw = fleet.channels[0].unary_stream(f"/{GATEWAY_SERVICE}/Generate")
        assert self.refusal(raw(b"\xff\xff\xff"))[0] is grpc.StatusCode.INVALID_ARGUMENT

    def test_an_id_that_runs_is_taken_and_an_abort_ends_it(self, fleet, stub):
        sampling = engine_pb.SamplingParams(temperature=0, max_tokens=12000, ignore_eos=True)
        call = stub.Generate(self.request("abc", request_id="one", sampling_params=sampling, stream=True))
        next(call)
        assert self.refusal(stub.Generate(self.request("abc", request_id="one")))[0] is grpc.StatusCode.ALREADY_EXISTS
        stub.Abort(engine_pb.AbortRequest(request_ids=["one", "another"]))
        assert list(call)[-1].complete.finish_reason == "abort"
        assert wait_until(lambda: fleet.running() == 0)

    def test_an_id_is_taken_while_its_text_waits_for_the_tokenizer(self, stub):
        before = [stub.Generate(self.request("a" * 16000)) for _ in range(16)]
        calls = [stub.Generate(self.request("b" * 16000, request_id="twice")) for _ in range(2)]
        for call in before:
            call.cancel()
        for call in calls:
            with suppress(grpc.RpcError):
                list(call)
        assert {call.code() for call in calls} == {grpc.StatusCode.OK, grpc.StatusCode.ALREADY_EXISTS}

    def test_a_request_of_another_front_is_not_aborted(self, fleet, stub):
        body = {"model": MODEL, "prompt": "abc", "temperature": 0, "stream": True, **ENDLESS, "max_tokens": 400}
        headers = {"x-request-id": "of-http"}
        with fleet.http[0].stream("POST", "/v1/completions", json=body, headers=headers) as response:
            lines = response.iter_lines()
            next(lines)
            names = ["of-http", "cmpl-of-http", "cmpl-of-http-0", "gateway-of-http"]
            stub.Abort(engine_pb.AbortRequest(request_ids=names))
            *_, last = (line for line in lines if line.startswith("data: {"))
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"

    @pytest.mark.parametrize("method", ["FlushCache", "StartProfile", "StopProfile"])
    def test_operators_calls_need_the_admin_key(self, stub, method):
        with pytest.raises(grpc.RpcError) as raised:
            getattr(stub, method)(_empty(method))
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED

    def test_an_operator_empties_the_cache(self, fleet, stub):
        prompt = new_prompt()
        cached = [text_of(complete(fleet.http[0], prompt)) and _cached(fleet.http[0], prompt)]
        stub.FlushCache(_empty("FlushCache"), metadata=OPERATOR)
        cached.append(_cached(fleet.http[0], prompt))
        assert cached == [1984, 0]

    def test_the_tokenizer_is_a_zip(self, stub):
        chunks = list(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
        with zipfile.ZipFile(BytesIO(b"".join(chunk.data for chunk in chunks))) as archive:
            assert "tokenizer.json" in archive.namelist()


def _ids(fleet, prompt: str) -> list[int]:
    return fleet.http[0].post("/tokenize", json={"model": MODEL, "prompt": prompt}).json()["tokens"]


def _empty(method: str):
    return common_pb2.FlushCacheRequest() if method == "FlushCache" else getattr(common_pb2, f"{method}Request")()


def _look_up(http: httpx.Client, path: str = "/v1/completions", **body) -> httpx.Response:
    return http.post(f"/starling/cached{path}", json={"model": MODEL} | body)


def _cached(http: httpx.Client, prompt: str) -> int:
    return _look_up(http, prompt=prompt).json()["replicas"][0]["cached_tokens"]


class TestCachedTokens:
    """What a server has cached of a prompt, for a router."""

    def test_documents_are_found_wherever_they_stand(self, fleet):
        http, (one, two, three) = fleet.http[1], (new_prompt(100) for _ in range(3))
        head, question = new_prompt(200), "|what?"
        text_of(complete(http, f"{head}|{one}|{two}{question}"))
        before = metrics(http, "starling:computed_tokens_total")
        body = {"prompt": f"{head}|{two}|{three}|{one}{question}", "max_tokens": 1}
        answer = _look_up(http, **body).json()
        assert metrics(http, "starling:computed_tokens_total") == before
        known, unknown = {"tokens": 101, "cached_tokens": 101}, {"tokens": 101, "cached_tokens": 0}
        assert answer["plan"]["documents"] is True
        assert answer["replicas"] == [{"cached_tokens": 200 + 2 * 101, "documents": [known, unknown, known]}]
        response = complete(http, **body)
        sources = json.loads(response.headers["x-starling-plan"])["document_sources"]
        assert [source.get("memory", 0) for source in sources] == [101, 0, 101]

    def test_of_a_dense_prompt_the_start_counts(self, fleet):
        http, prompt = fleet.http[1], new_prompt(1000)
        dense = {"vllm_xargs": {"star": "off"}}
        text_of(complete(http, prompt, **dense))
        answer = _look_up(http, prompt=f"{prompt[:500]}x{prompt[501:]}", **dense).json()
        assert answer["plan"]["attention"] == "dense"
        assert answer["replicas"] == [{"cached_tokens": 480, "documents": []}]

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
    def test_all_apis_answer(self, fleet, path, stream):
        http, text = fleet.http[1], new_prompt(600)
        messages = [{"role": "user", "content": text}]
        body = {"max_tokens": 4, "stream": stream}
        prompts = {
            "/v1/completions": {"prompt": text, "logprobs": 1, "echo": not stream},
            "/v1/chat/completions": {"messages": messages, "logprobs": True, "top_logprobs": 2},
            "/v1/responses": {"input": text},
        }
        body |= prompts.get(path, {"messages": messages})
        http.post(path, json={"model": MODEL} | body).raise_for_status()
        errors = fleet.servers[1].log.read_text().count(" ERROR ")
        answer = _look_up(http, path, **body)
        assert answer.status_code == 200, answer.text
        assert fleet.servers[1].log.read_text().count(" ERROR ") == errors
        assert answer.json()["replicas"][0]["cached_tokens"] >= 512, answer.text

    @pytest.mark.parametrize(
        ("path", "body", "status", "text"),
        [
            ("/pause", {}, 404, "/starling/cached goes before"),
            ("/v1/completions", {"prompt": "x" * 20000}, 400, "16384"),
            ("/v1/completions", {"prompt": "abc", "vllm_xargs": {"star_block_size": 3}}, 400, "star_block_size=3"),
            ("/v1/completions", {"model": "other", "prompt": "abc"}, 404, "other"),
            ("/v1/completions", {"prompt": ["abc", "def"], "stream": True}, 400, "One prompt is looked up"),
            ("/v1/responses", {"input": "abc", "background": True, "stream": True}, 400, "in the background"),
        ],
    )
    def test_what_cant_be_looked_up_is_refused_as_the_request_is(self, fleet, path, body, status, text):
        response = _look_up(fleet.http[1], path, **body)
        assert response.status_code == status
        assert text in response.text

    def test_a_gateway_passes_it_on(self, gateways):
        if is_installed(VLLM_ROUTER):
            assert "replicas" in _look_up(gateways[VLLM_ROUTER], prompt=new_prompt(300)).json()


def test_a_router_sends_documents_where_they_are(fleet, tmp_path):
    """examples/document_router.py: each server gets the prompt whose documents it has, in another order."""
    head, question = new_prompt(200), "|what?"
    documents = [[new_prompt(150) for _ in range(3)] for _ in fleet.servers]
    with (
        gateway_before(DOCUMENT_ROUTER, fleet.servers, tmp_path / "log") as url,
        httpx.Client(base_url=url, timeout=300) as router,
    ):
        for http, texts in zip(fleet.http, documents, strict=True):
            text_of(complete(http, "|".join([head, *texts]) + question))
        before = fleet.count("starling:computed_tokens_total")
        for texts in documents:
            response = complete(router, "|".join([head, *texts[::-1]]) + question)
            assert json.loads(response.headers["x-starling-plan"])["documents"] is True
        now = fleet.count("starling:computed_tokens_total")
        assert all(0 < after - earlier < 150 for after, earlier in zip(now, before, strict=True))
        assert streamed(router, "/v1/completions", prompt="abc")
        assert complete(router, "x" * 20000).status_code == 400


def test_a_server_that_is_drained_or_killed_costs_other_requests_nothing(gateways, fleet, tmp_path):
    """The last test: its server is gone. Requests that ran on it get what the gateway makes of that."""
    names = [name for name in (SMG, VLLM_ROUTER) if is_installed(name)]
    admin = admin_pb2_grpc.AdminServiceStub(fleet.channels[0])
    assert admin.Drain(admin_pb2.DrainRequest(), metadata=OPERATOR).requests_left == 0
    before = fleet.count("starling:requests_total")
    for name in names:
        for _ in range(4):
            text_of(complete(gateways[name], new_prompt(300)))
    after = fleet.count("starling:requests_total")
    assert [now - then for now, then in zip(after, before, strict=True)] == [0, 4 * len(names)]
    with (
        gateway_before(DOCUMENT_ROUTER, fleet.servers, tmp_path / "log") as url,
        httpx.Client(base_url=url, timeout=300) as router,
    ):
        text_of(complete(router, new_prompt(300)))
    fleet.servers[0].process.send_signal(signal.SIGKILL)
    fleet.servers[0].process.wait()
    with (
        gateway_before(DOCUMENT_ROUTER, fleet.servers, tmp_path / "log") as url,
        httpx.Client(base_url=url, timeout=300) as router,
    ):
        text_of(complete(router, new_prompt(300)))
    for name in names:
        for _ in range(4):
            text_of(complete(gateways[name], new_prompt(300)))
