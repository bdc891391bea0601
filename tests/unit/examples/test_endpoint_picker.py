"""examples/endpoint_picker.py, with a gateway's messages and servers that say anything."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
import warnings
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # the package's own, of pydantic
    importlib.import_module("envoy_data_plane.envoy.service.ext_proc.v3")

from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue, Metadata
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as BodyMode
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
    ProtocolConfiguration,
)
from envoy_data_plane.google.protobuf import Struct

from examples.server import free_ports
from tests.unit.examples.test_kubernetes import ROOT

ONE, TWO = "10.0.0.1:8000", "[fd00::2]:8000"
CACHED = {"10.0.0.1": 10, "fd00::2": 60}


@pytest.fixture
def module(monkeypatch):
    """The program, which imports the router beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("endpoint_picker")


@pytest.fixture
def picker(module):
    """A picker of two servers, of which the second has cached more of each prompt."""
    picker = module.EndpointPicker([ONE, TWO])
    picker.asked = []

    async def serve(request: httpx.Request) -> httpx.Response:
        picker.asked.append(request)
        cached = CACHED[request.url.host]
        return httpx.Response(200, json={"plan": {"prompt_tokens": 100}, "replicas": [{"cached_tokens": cached}]})

    use(picker, serve)
    asyncio.run(picker.look_up())
    return picker


def use(picker: Any, serve: Any) -> None:
    picker.router.client = httpx.AsyncClient(transport=httpx.MockTransport(serve))


def headers(
    ends: bool = False,
    mode: BodyMode = BodyMode.FULL_DUPLEX_STREAMED,
    subset: Any = None,
    path: str = "/v1/completions?x=1",
) -> ProcessingRequest:
    pairs = {":path": path, ":method": "POST", "authorization": "Bearer é", "content-length": "7"}
    values = [HeaderValue(key=key, raw_value=value.encode()) for key, value in pairs.items()]
    config = ProtocolConfiguration(request_body_mode=mode, response_body_mode=mode)
    hint = Struct.from_dict({"x-gateway-destination-endpoint-subset": subset})
    metadata = None if subset is None else Metadata(filter_metadata={"envoy.lb.subset_hint": hint})
    given = HttpHeaders(headers=HeaderMap(headers=values), end_of_stream=ends)
    return ProcessingRequest(request_headers=given, protocol_config=config, metadata_context=metadata)


def body(text: bytes = b"{}", ends: bool = True) -> ProcessingRequest:
    return ProcessingRequest(request_body=HttpBody(body=text, end_of_stream=ends))


def answered(text: bytes = b"hi", ends: bool = True) -> ProcessingRequest:
    return ProcessingRequest(response_body=HttpBody(body=text, end_of_stream=ends))


def process(picker: Any, *messages: ProcessingRequest) -> list[ProcessingResponse]:
    """The answers to a gateway's messages, each as it is on the wire."""

    async def scenario() -> list[ProcessingResponse]:
        async def sent():
            for message in messages:
                yield ProcessingRequest.parse(bytes(message))

        return [ProcessingResponse.parse(bytes(each)) async for each in picker.process(sent(), None)]

    return asyncio.run(scenario())


def destination(answer: ProcessingResponse) -> str:
    """The endpoints of an answer, which its header and its metadata name alike."""
    part = answer.request_headers or answer.request_body
    (option,) = part.response.header_mutation.set_headers
    assert option.header.key == "x-gateway-destination-endpoint"
    named = option.header.raw_value.decode()
    assert answer.dynamic_metadata.to_dict() == {"envoy.lb": {"x-gateway-destination-endpoint": named}}
    assert option.append_action.name == "OVERWRITE_IF_EXISTS_OR_ADD"
    return named


def refused(answers: list[ProcessingResponse]) -> tuple[int, str]:
    (answer,) = answers
    return int(answer.immediate_response.status.code), answer.immediate_response.body.decode()


def test_a_request_goes_with_its_body_where_most_of_it_is_cached(picker, module):
    text = b"{" + b"x" * (2 * module.PIECE) + b"}"
    first, *rest = process(picker, headers(), body(text[:9], ends=False), body(text[9:]))
    assert destination(first) == TWO
    pieces = [each.request_body.response.body_mutation.streamed_response for each in rest]
    assert b"".join(piece.body for piece in pieces) == text
    assert [piece.end_of_stream for piece in pieces] == [False, False, True]
    assert {request.url.path for request in picker.asked} == {"/starling/cached/v1/completions"}
    assert all(request.content == text for request in picker.asked)
    assert picker.asked[0].headers.raw.count((b"authorization", "Bearer é".encode())) == 1


def test_trailers_end_a_request(picker):
    first, piece, last = process(
        picker, headers(), body(ends=False), ProcessingRequest(request_trailers=HttpTrailers(trailers=HeaderMap()))
    )
    assert destination(first) == TWO
    assert not piece.request_body.response.body_mutation.streamed_response.end_of_stream
    assert last.request_trailers is not None


def test_a_gateway_that_buffers_gets_the_endpoint_with_the_body(picker):
    first, second = process(picker, headers(mode=BodyMode.BUFFERED), body())
    assert first.request_headers is not None and first.dynamic_metadata is None
    assert second.request_body.response.body_mutation is None
    assert destination(second) == TWO


def test_other_ways_to_send_bodies_are_refused(picker):
    status, text = refused(process(picker, headers(mode=BodyMode.STREAMED)))
    assert (status, "FULL_DUPLEX_STREAMED or BUFFERED" in text) == (500, True)


def test_further_endpoints_come_in_order(picker):
    picker.endpoints = 2
    assert destination(process(picker, headers(), body())[0]) == f"{TWO},{ONE}"


@pytest.mark.parametrize("subset", [[ONE], f"{ONE}, 10.9.9.9:1", [ONE, "10.9.9.9:1"]])
def test_only_the_subset_is_asked(picker, subset):
    assert destination(process(picker, headers(subset=subset), body())[0]) == ONE
    assert {request.url.host for request in picker.asked} == {"10.0.0.1"}


@pytest.mark.parametrize("subset", [[], "", ["10.9.9.9:1"]])
def test_without_an_eligible_endpoint_the_answer_is_503(picker, subset):
    assert refused(process(picker, headers(subset=subset), body())) == (503, "no server is ready")


def test_without_servers_the_answer_is_503(picker):
    picker.servers = {}
    assert refused(process(picker, headers(ends=True))) == (503, "no server is ready")


def test_requests_are_shed_while_tokens_wait_everywhere(picker):
    picker.shed = 100
    picker.servers[ONE].waiting, picker.servers[TWO].waiting = 100, 99
    assert destination(process(picker, headers(subset=[TWO]), body())[0]) == TWO
    assert refused(process(picker, headers(subset=[ONE]), body())) == (429, "100 tokens or more wait at every server")


def test_a_body_that_is_too_large_is_refused_before_any_server_is_asked(picker, module, monkeypatch):
    monkeypatch.setattr(module, "MAX_BODY", 3)
    status, text = refused(process(picker, headers(), body(b"{  }")))
    assert (status, picker.asked) == (413, [])
    assert "more than 3 bytes" in text


def test_tokens_wait_until_the_server_begins_to_answer(picker):
    seen = []

    async def scenario(*messages: ProcessingRequest) -> None:
        async def sent():
            for message in messages:
                yield message
                seen.append(picker.servers[TWO].waiting)

        async for _ in picker.process(sent(), None):
            pass

    response = ProcessingRequest(response_headers=HttpHeaders())
    asyncio.run(scenario(headers(), body(), response, answered(ends=False), answered()))
    assert seen == [0, 40, 40, 0, 0]
    asyncio.run(scenario(headers(), body(), response))
    assert picker.servers[TWO].waiting == 0, "the client has left"


def test_responses_pass_as_they_are(picker):
    *_, piece, last = process(picker, headers(), body(), answered(b"hi", ends=False), answered(b""))
    streamed = [each.response_body.response.body_mutation.streamed_response for each in (piece, last)]
    assert [(each.body, each.end_of_stream) for each in streamed] == [(b"hi", False), (b"", True)]
    *_, last = process(picker, headers(mode=BodyMode.BUFFERED), body(), answered())
    assert last.response_body is not None and last.response_body.response is None


@pytest.mark.parametrize("status", [403, 404])
def test_servers_that_do_not_say_what_they_have_get_requests_by_load_and_are_logged(picker, status, caplog):
    async def refuse(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text="start it with --enable-prompt-tokens-details")

    use(picker, refuse)
    picker.servers[ONE].waiting = 1
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert destination(process(picker, headers(), body(b"x" * 400))[0]) == TWO
    records = [record.getMessage() for record in caplog.records]
    assert len(records) == 2, "once for each server"
    assert all(f"{status} start it with --enable-prompt-tokens-details" in record for record in records)


def test_other_requests_go_to_the_least_busy_server_unasked(picker):
    for waiting, expected in ((0, ONE), (1, TWO)):
        picker.servers[ONE].waiting = waiting
        assert destination(process(picker, headers(ends=True, path="/v1/models"))[0]) == expected
    assert destination(process(picker, headers(path="/v1/embeddings"), body())[0]) == TWO
    assert picker.asked == []


def test_a_names_servers_are_all_its_addresses(module, monkeypatch, caplog):
    addresses = {"starling-pods": ["10.0.0.1", "fd00::2"]}

    async def look_up(self, host, port, **_):
        if host not in addresses:
            raise socket.gaierror("unknown")
        return [(None, None, None, "", (address, port)) for address in addresses[host]]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    picker = module.EndpointPicker(["starling-pods:8000", "nowhere:1"])
    asyncio.run(picker.look_up())
    assert {name: server.url for name, server in picker.servers.items()} == {ONE: f"http://{ONE}", TWO: f"http://{TWO}"}
    assert "nowhere:1 has no address" in caplog.text
    kept = picker.servers[TWO]
    addresses["starling-pods"] = ["fd00::2", "10.0.0.3"]
    asyncio.run(picker.look_up())
    assert list(picker.servers) == [TWO, "10.0.0.3:8000"]
    assert picker.servers[TWO] is kept


def test_it_serves_over_tls_and_ends_its_calls_after_sigterm(picker, module, certificates):
    certificate, key = certificates
    port, health_port = free_ports(0, 0)
    pair = ["--certificate", str(certificate), "--key", str(key)]
    args = module.parse([ONE, "--port", str(port), "--health-port", str(health_port), *pair])

    async def scenario() -> None:
        serving = asyncio.ensure_future(picker.serve(args))
        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        async with (
            grpc.aio.secure_channel(f"localhost:{port}", trusted) as channel,
            grpc.aio.insecure_channel(f"127.0.0.1:{health_port}") as plain,
        ):
            ready = health_pb2.HealthCheckRequest(service="readiness")
            checks = health_pb2_grpc.HealthStub(plain)
            answer = await checks.Check(ready, wait_for_ready=True, timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            call = channel.stream_stream(
                f"/{module.SERVICE}/Process", request_serializer=bytes, response_deserializer=ProcessingResponse.parse
            )(timeout=60)
            for message in (headers(), body()):
                await call.write(message)
            assert destination(await call.read()) == TWO
            assert (await call.read()).request_body is not None
            os.kill(os.getpid(), signal.SIGTERM)
            while (await checks.Check(ready)).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                await asyncio.sleep(0.01)
            await call.write(answered())
            assert (await call.read()).response_body is not None
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            await asyncio.wait_for(serving, 60)

    asyncio.run(scenario())
    assert picker.servers[TWO].waiting == 0


def test_a_certificate_needs_its_key(module, capsys):
    with pytest.raises(SystemExit):
        module.parse([ONE, "--certificate", "file"])
    assert "--certificate and --key go together" in capsys.readouterr().err
