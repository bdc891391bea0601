"""One `starling serve` under random requests: HTTP with Starling's options, gRPC streams in any order, and cut ones.

Nothing may fail inside the server, and nothing may be left behind. A short run has the same requests each time;
`make fuzz MINUTES=30` draws new ones, and runs schemathesis too. tests/e2e/test_load.py has single gRPC messages.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks.random_llama import make_tiny_llama
from examples.server import serving
from starling.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from starling.v1 import inference_pb2 as pb
from tests.e2e import fuzz_http
from tests.e2e.cut import CuttingProxy
from tests.e2e.fuzz import messages, mutated
from tests.e2e.serving import MODEL, NO_REUSE, PAGE_SIZE, body, running
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

ADMIN = (("authorization", "Bearer key-of-the-admin"),)
INFERENCE = "/starling.v1.InferenceService"
ADMINISTRATION = "/starling.v1.AdminService"
FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS}
PARTS = 6
"""Tests that share the minutes of a long run."""

counts: Counter[str] = Counter()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    model = make_tiny_llama(folder / MODEL)
    options = ["--served-model-name", MODEL, "--dtype", "float32", "--block-size", str(PAGE_SIZE), "--enforce-eager"]
    # A request without a limit of its own, or with a huge one, generates few tokens.
    options += ["--override-generation-config", '{"max_new_tokens": 3}', "--grpc-admin-key", "key-of-the-admin"]
    options += ["--enable-scale-out"]  # for /inference/v1/generate
    with serving(model, *options, log=folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.http, timeout=300, limits=NO_REUSE) as client:
        yield client


@pytest.fixture(scope="module")
def expected(http):
    """A plain answer, before anything random was sent."""
    return answer(http)


def answer(http) -> str:
    response = http.post("/v1/completions", json=body("/v1/completions"))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.fixture
def fuzz(request, expected):
    """A function that calls ``check`` with so many examples of a strategy, in a long run again and again."""
    minutes = request.config.getoption("--fuzz-minutes")

    def run(strategy: st.SearchStrategy, examples: int, check: Any) -> None:
        ends = time.monotonic() + 60 * minutes / PARTS
        again = True
        while again:
            drawn = given(strategy)(lambda value: check(value))
            if minutes:
                drawn = seed(int.from_bytes(os.urandom(8)))(drawn)
            settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=not minutes,
                suppress_health_check=list(HealthCheck),
            )(drawn)()
            again = time.monotonic() < ends

    return run


# HTTP.


def test_http_requests_with_any_options_are_answered_or_refused(http, fuzz):
    """A request that vLLM itself fails at, without Starling's options, is left out."""
    fields = fuzz_http.body_fields(http.get("/openapi.json").json())

    def post(path: str, content: dict[str, Any]) -> int:
        headers = {"content-type": "application/json"}
        return http.post(path, content=fuzz_http.encode(content), headers=headers).status_code

    def check(drawn: tuple[str, dict[str, Any]]) -> None:
        path, content = drawn
        status = post(path, content)
        counts[f"HTTP {status}"] += 1
        if status >= 500:
            plain = post(path, fuzz_http.without_options(content))
            counts[f"HTTP {plain} of vLLM's own"] += 1
            assert plain == status, f"{path} answers {status} to {content}"

    fuzz(fuzz_http.requests(fields), 200, check)


@pytest.mark.parametrize("path", fuzz_http.PATHS)
def test_a_client_that_leaves_a_stream_leaves_nothing_behind(server, http, expected, path):
    content = fuzz_http.PATHS[path] | {"stream": True}
    if path == "/inference/v1/generate":
        content |= {"sampling_params": {"max_tokens": 2}}
    with http.stream("POST", path, json=content) as response:
        assert response.status_code == 200
    assert wait_until(lambda: not running(http))


def test_requests_of_schemathesis_are_answered_or_refused(request, server, fuzz):
    if not request.config.getoption("--fuzz-minutes"):
        pytest.skip("schemathesis is not in this environment: `make fuzz` runs it")
    from tests.e2e import fuzz_schema

    def check(case: Any) -> None:
        status = fuzz_schema.status(case)
        counts[f"schemathesis {status}"] += 1
        if status >= 500:
            plain = fuzz_schema.status(case, plain=True)
            counts[f"schemathesis {plain} of vLLM's own"] += 1
            assert plain == status, f"{case.method} {case.path} answers {status} to {case.body}"

    fuzz(fuzz_schema.cases(server.http), 200, check)


# gRPC.


def status(call: Any, limit: int | None = None) -> grpc.StatusCode:
    """The status of a call; cancelled after ``limit`` responses, where it has a limit."""
    try:
        for number, _ in enumerate(call):
            if number == limit:
                call.cancel()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def count(code: grpc.StatusCode) -> None:
    counts[f"gRPC {code.name}"] += 1
    assert code not in FAULTS, code


def short(message: Any) -> Any:
    """The message with few tokens and choices."""
    sampling = message.head.sampling if isinstance(message, pb.GenerateUploadStreamRequest) else message.sampling
    sampling.max_tokens = 2
    sampling.n = min(sampling.n, 2)
    return message


HEAD = pb.GenerateUploadStreamRequest(head=pb.GenerateStreamRequest(sampling=pb.SamplingParams(max_tokens=2)))
ANY_PART = messages(pb.GenerateUploadStreamRequest.DESCRIPTOR).map(
    lambda part: short(part) if part.WhichOneof("part") == "head" else part
)
PART = st.one_of(
    st.just(HEAD),
    st.sampled_from(["", "abc", "\x00" * 40]).map(lambda text: pb.GenerateUploadStreamRequest(text=text)),
    st.lists(st.integers(0, 300), max_size=60).map(
        lambda ids: pb.GenerateUploadStreamRequest(token_ids=pb.TokenIds(ids=ids))
    ),
    ANY_PART,
)
UPLOADS = st.tuples(
    st.lists(PART.map(lambda part: part.SerializeToString()) | st.binary(max_size=20), max_size=5).flatmap(
        lambda parts: st.sampled_from([parts, [HEAD.SerializeToString(), *parts]])
    ),
    st.sampled_from([None, None, 0, 1]),
)


def test_uploads_in_any_order_are_answered_or_refused(channel, fuzz):
    upload = channel.stream_stream(f"{INFERENCE}/GenerateUploadStream")

    def check(drawn: tuple[list[bytes], int | None]) -> None:
        parts, limit = drawn
        count(status(upload(iter(parts), timeout=300), limit))

    fuzz(UPLOADS, 100, check)


def test_cancelled_calls_are_answered_or_refused(channel, fuzz):
    stream = channel.unary_stream(f"{INFERENCE}/GenerateStream")
    kinds = messages(pb.GenerateStreamRequest.DESCRIPTOR).map(short)

    def check(drawn: tuple[Any, int | None, float | None]) -> None:
        message, limit, seconds = drawn
        call = stream(message.SerializeToString(), timeout=seconds)
        if limit is None:
            call.cancel()
        count(status(call, limit))

    fuzz(st.tuples(kinds, st.sampled_from([None, 0, 1]), st.sampled_from([0.001, 0.02, 60.0])), 80, check)


ADMIN_METHODS = {
    method.name: method
    for method in admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods
    if method.name != "Drain"  # it would end the run; without the key it is refused
}


def test_administration_takes_any_message(channel, fuzz):
    def one(name: str) -> st.SearchStrategy:
        valid = messages(ADMIN_METHODS[name].input_type)
        content = (
            valid.map(lambda message: message.SerializeToString()) | valid.flatmap(mutated) | st.binary(max_size=40)
        )
        return st.tuples(st.just(name), content, st.sampled_from([ADMIN, ADMIN, (), (("authorization", "Bearer x"),)]))

    def check(drawn: tuple[str, bytes, Any]) -> None:
        name, data, metadata = drawn
        try:
            channel.unary_unary(f"{ADMINISTRATION}/{name}")(data, metadata=metadata, timeout=300)
            count(grpc.StatusCode.OK)
        except grpc.RpcError as error:
            count(error.code())
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"{ADMINISTRATION}/Drain")(data, timeout=300)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

    fuzz(st.sampled_from(sorted(ADMIN_METHODS)).flatmap(one), 60, check)


def test_connections_cut_anywhere_leave_the_server_as_it_was(server, fuzz):
    """The client vanishes within a frame: in its preface, its headers, a message, or behind the last byte."""
    message = pb.GenerateStreamRequest(text="abc" * 60, sampling=pb.SamplingParams(max_tokens=2, ignore_eos=True))

    def check(limit: int) -> None:
        proxy.limit = limit
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(proxy.address, options) as cut, suppress(grpc.RpcError):
            for _ in inference_pb2_grpc.InferenceServiceStub(cut).GenerateStream(message, timeout=2):
                pass
        counts["connections cut"] += 1

    proxy = CuttingProxy(server.grpc)
    try:
        fuzz(st.integers(0, 1000), 30, check)
    finally:
        proxy.close()


def test_nothing_is_left_behind(server, http, channel, expected):
    """Runs last: no request, no page that is not explained, and the same answer as before."""
    print(dict(sorted(counts.items())))
    admin = admin_pb2_grpc.AdminServiceStub(channel)

    def cache() -> admin_pb2.EngineCache:
        message = admin_pb2.GetCacheStateRequest(per_request=True)
        while (answer := admin.GetCacheState(message, metadata=ADMIN)).unanswered:
            pass  # the server waits for an engine for 5 s
        (state,) = answer.engines
        return state

    assert wait_until(lambda: not (cache().pages_used or cache().requests_running or cache().requests_waiting))
    state = cache()
    assert not state.requests
    assert state.pages_cached + state.pages_free == state.pages_total
    assert not running(http)
    assert http.get("/health").status_code == 200
    assert answer(http) == expected
    assert server.process.poll() is None
