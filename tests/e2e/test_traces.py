"""A server of two replicas that traces requests, and a collector that speaks OTLP over gRPC, as a real one does."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks.random_llama import make_tiny_llama
from examples.server import serving
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc
from tests.e2e.replicas import ENGINE_OPTIONS, parse_completion, post, random_prompt
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

DOCUMENTS = {"star": "on", "star_replicas": 1, "star_segments": [40, 200, 360], "star_query_tokens": 20}
SPLIT = {"star": "on", "star_block_size": 256, "star_query_tokens": 40, "star_replicas": 2}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it gets."""

    def __init__(self) -> None:
        self.spans = []

    def Export(self, request, context):
        self.spans += [
            span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace_id: bytes) -> dict[str, list]:
        """The spans of a trace by their names."""
        found: dict[str, list] = {}
        for span in [span for span in self.spans if span.trace_id == trace_id]:
            found.setdefault(span.name, []).append(span)
        return found


@contextmanager
def collecting():
    """(collector, its address)."""
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(server, collector)."""
    folder = tmp_path_factory.mktemp("traces")
    with pytest.MonkeyPatch.context() as patch, collecting() as (collector, address):
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds between two exports
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        options = [*ENGINE_OPTIONS, "--data-parallel-size", "2", "--num-gpu-blocks-override", "400"]
        options += ["--otlp-traces-endpoint", address, "--enable-prompt-tokens-details"]
        with serving(make_tiny_llama(folder / "tiny"), *options, log=folder / "log") as server:
            yield server, collector


def new_trace() -> tuple[bytes, bytes, str]:
    """(trace, span of the client, both as its header)."""
    trace, span = secrets.token_bytes(16), secrets.token_bytes(8)
    return trace, span, f"00-{trace.hex()}-{span.hex()}-01"


def spans_of(collector, trace: bytes, *names: str) -> dict[str, list]:
    wait_until(lambda: set(names) <= set(collector.of_trace(trace)))
    return collector.of_trace(trace)


def attributes(span) -> dict:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def over_grpc(server, prompt, star: dict, metadata) -> pb.Plan:
    options = pb.StarOptions(mode=pb.StarOptions.MODE_ON, **star)
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), star=options)
    message.sampling.CopyFrom(pb.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    with grpc.insecure_channel(server.grpc) as channel:
        answer = inference_pb2_grpc.InferenceServiceStub(channel).Generate(message, metadata=metadata)
    return answer


@pytest.mark.parametrize("front", ["http", "grpc"])
def test_documents_are_a_span_under_the_clients_and_over_vllms(traced, front):
    server, collector = traced
    (trace, client, header), prompt = new_trace(), random_prompt(secrets.randbits(30), 400)
    if front == "http":
        with post(server, prompt, DOCUMENTS, headers={"traceparent": header}) as response:
            assert parse_completion(response)[2]["documents"] is True
    else:
        star = {"query_tokens": 20, "replicas": 1, "segment_offsets": DOCUMENTS["star_segments"]}
        over_grpc(server, prompt, star, [("traceparent", header)])
    found = spans_of(collector, trace, "starling", "starling plan", "llm_request")
    (span,), (planned,), (request,) = found["starling"], found["starling plan"], found["llm_request"]
    assert span.parent_span_id == client
    assert planned.parent_span_id == request.parent_span_id == span.span_id
    assert span.start_time_unix_nano <= planned.start_time_unix_nano <= planned.end_time_unix_nano
    (first,) = span.events
    assert first.name == "first token" and planned.end_time_unix_nano <= first.time_unix_nano <= span.end_time_unix_nano
    said = attributes(span)
    assert said["starling.attention"] == "star" and said["starling.documents"] is True
    assert said["starling.num_documents"] == 3 and said["starling.document_tokens.computed"] == 340
    assert said["starling.prompt_tokens"] == 400 and said["starling.keys_attended"] < said["starling.dense_keys"]


def test_a_split_prompt_has_a_span_for_each_part(traced):
    server, collector = traced
    trace, _, header = new_trace()
    with post(server, random_prompt(secrets.randbits(30), 1500), SPLIT, headers={"traceparent": header}) as response:
        assert parse_completion(response)[2]["replicas"] == 2
    found = spans_of(collector, trace, "starling", "starling part", "llm_request")
    (span,), parts = found["starling"], found["starling part"]
    assert {part.parent_span_id for part in parts} == {span.span_id}
    said = [attributes(part) for part in parts]
    assert {part["starling.replica"] for part in said} == {"0", "1"}
    assert sum(part["starling.star_blocks"] for part in said) == 6 and all(part["starling.pages"] > 0 for part in said)


def test_requests_without_a_parent_have_traces_of_their_own(traced):
    server, collector = traced
    before = len([span for span in collector.spans if span.name == "starling"])
    gate = threading.Barrier(2)

    def ask(seed: int) -> None:
        gate.wait()
        with post(server, random_prompt(seed, 50)) as response:
            response.read()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, (1, 2)))
    wait_until(lambda: len([span for span in collector.spans if span.name == "starling"]) == before + 2)
    spans = [span for span in collector.spans if span.name == "starling"][before:]
    assert len({span.trace_id for span in spans}) == 2
    assert all(span.parent_span_id == b"" and attributes(span)["starling.attention"] == "dense" for span in spans)
    for span in spans:
        (request,) = spans_of(collector, span.trace_id, "llm_request")["llm_request"]
        assert request.parent_span_id == span.span_id
