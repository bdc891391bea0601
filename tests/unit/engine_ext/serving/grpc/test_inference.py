"""The gRPC server on a fake engine: errors, overload, keys, TLS, cancellation, drain and shutdown."""

import asyncio
import contextlib
import json
import time
from argparse import Namespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from examples.server import free_ports
from starling.engine_ext.serving.grpc.auth import server_credentials
from starling.engine_ext.serving.grpc.inference import SERVICE
from starling.engine_ext.serving.grpc.server import Front
from starling.engine_ext.serving.grpc.server_options import AdminOptions
from starling.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, front_of

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PROMPT = pb.GenerateStreamRequest(text="abc")
DEADLINES = (0.3, 3, 30, 300)
"""Seconds. The first deadline before which a call reaches the engine counts: a busy machine may need another one."""


async def status_of(client, service: str = SERVICE) -> int:
    return (await client.health.Check(health_pb2.HealthCheckRequest(service=service))).status


async def events_of(call) -> list[pb.GenerateStreamResponse]:
    """What is left of a stream that has been read from already."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def error_of(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await events_of(call)
    return failed.value.code(), failed.value.details()


async def stream_of(*parts):
    for part in parts:
        yield part


async def until(condition) -> None:
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.01)


def test_deltas_then_final():
    async def scenario():
        async with front_of(FakeEngine("ab", "", "c")) as client:
            return await events_of(client.generate(PROMPT))

    *deltas, last = asyncio.run(scenario())
    assert [event.delta.text for event in deltas] == ["ab", "c"]
    assert last.final.usage == pb.Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3)
    assert last.final.finish_reason == pb.Final.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("error", "code", "health"),
    [
        (EngineDeadError(), grpc.StatusCode.UNAVAILABLE, NOT_SERVING),
        (EngineGenerateError(), grpc.StatusCode.INTERNAL, SERVING),
        (VLLMValidationError("no"), grpc.StatusCode.INVALID_ARGUMENT, SERVING),
        (ValueError("no"), grpc.StatusCode.INVALID_ARGUMENT, SERVING),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_of_the_engine(error, code, health):
    async def scenario():
        async with front_of(FakeEngine("a", error)) as client:
            got = await error_of(client.generate(PROMPT))
            return got[0], await status_of(client), await status_of(client, "")

    assert asyncio.run(scenario()) == (code, health, health)


def test_a_dead_engine_and_a_full_one_have_different_codes():
    async def scenario():
        engine = FakeEngine("a", refuses=QueueOverflowError())
        async with front_of(engine) as client:
            full = await error_of(client.generate(PROMPT))
            engine.errored = True
            dead = await error_of(client.generate(PROMPT))
            return full[0], dead[0], engine.ended

    assert asyncio.run(scenario()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, [])


@pytest.mark.parametrize(
    "error", [QueueOverflowError(), MaxQueuedTokensError()], ids=lambda error: type(error).__name__
)
def test_overload_says_when_to_try_again(error):
    async def scenario():
        engine = FakeEngine(refuses=error)
        async with front_of(engine) as client:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await events_of(client.generate(pb.GenerateStreamRequest(text="abc", sampling={"n": 3})))
            return refused.value, engine.admitted

    refused, admitted = asyncio.run(scenario())
    retry = error_details_pb2.RetryInfo()
    assert rpc_status.from_call(refused).details[0].Unpack(retry)
    assert (refused.code(), retry.retry_delay.seconds) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1)
    assert admitted == [3], "each choice counts as a request"


def test_grpcs_own_retry_policy_obeys_the_servers_pushback():
    """With the policy of docs/grpc.md, gRPC itself retries; the client has no code of Starling."""
    policy = {"maxAttempts": 4, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1}
    policy["retryableStatusCodes"] = ["RESOURCE_EXHAUSTED", "UNAVAILABLE"]
    methods = [{"name": [{"service": SERVICE}], "retryPolicy": policy}]

    class FullAtFirst(FakeEngine):
        def check_admission(self, n: int) -> None:
            self.refuses = None if self.admitted else QueueOverflowError()
            super().check_admission(n)

    async def scenario():
        engine = FullAtFirst("a")
        async with front_of(engine) as client:
            options = [("grpc.service_config", json.dumps({"methodConfig": methods}))]
            async with grpc.aio.insecure_channel(client.address, options) as channel:
                started = time.monotonic()
                events = await events_of(inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(PROMPT))
                return events, time.monotonic() - started, len(engine.admitted)

    events, waited, attempts = asyncio.run(scenario())
    assert [event.WhichOneof("event") for event in events] == ["delta", "final"]
    assert attempts == 2
    assert waited > 0.5, "the server's 1 s, not the policy's 10 ms"


def test_a_prompt_that_fills_the_context_is_named():
    async def scenario():
        async with front_of(FakeEngine(max_model_len=10)) as client:
            return await error_of(client.generate(PROMPT))

    code, text = asyncio.run(scenario())
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "10 tokens fills" in text


def test_duplicate_id_until_the_first_has_ended():
    async def scenario():
        engine = FakeEngine("a", None)
        named = pb.GenerateStreamRequest(text="abc", request_id="mine")
        async with front_of(engine) as client:
            first = client.generate(named)
            await first.read()
            code, text = await error_of(client.generate(named))
            other = client.generate(pb.GenerateStreamRequest(text="abc", request_id="other"))
            await other.read()
            engine.release.set()
            for call in (first, other):
                assert (await events_of(call))[-1].WhichOneof("event") == "final"
            # A call starts when it is made, so this one is made once the first has ended.
            assert (await events_of(client.generate(named)))[-1].WhichOneof("event") == "final"
            return code, text

    code, text = asyncio.run(scenario())
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert "'mine'" in text


@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_ending_the_call_ends_the_request(way):
    async def scenario():
        engine = FakeEngine("a", None)
        async with front_of(engine) as client:
            for seconds in DEADLINES if way == "deadline" else [None]:
                named = pb.GenerateStreamRequest(text="abc", request_id=f"mine-{seconds}")
                call = client.generate(named, timeout=seconds)
                if way == "cancel":
                    await call.read()
                    assert engine.ended == []
                    call.cancel()
                else:
                    await error_of(call)
                if engine.calls:
                    break
            await until(lambda: engine.ended == [f"grpc-{named.request_id}"])
            engine.release.set()
            await events_of(client.generate(named))  # its id is free again

    asyncio.run(scenario())


def test_shutdown_drains():
    async def scenario():
        engine = FakeEngine("a", None, "b")
        async with front_of(engine) as client:
            call = client.generate(PROMPT)
            await call.read()
            stopping = asyncio.create_task(client.front.stop(300))
            await until(lambda: client.front.draining)
            health = await status_of(client)
            code, text = await error_of(client.generate(PROMPT))
            assert not stopping.done()
            engine.release.set()
            rest = await events_of(call)
            await stopping
            return health, code, text, [event.WhichOneof("event") for event in rest]

    health, code, text, rest = asyncio.run(scenario())
    assert (health, code, rest) == (NOT_SERVING, grpc.StatusCode.UNAVAILABLE, ["delta", "final"])
    assert "shutting down" in text


def test_shutdown_ends_streams_after_the_grace():
    async def scenario():
        engine = FakeEngine("a", None)
        async with front_of(engine) as client:
            call = client.generate(PROMPT)
            await call.read()
            await client.front.stop(0.1)
            await until(lambda: len(engine.ended) == 1)
            return (await error_of(call))[0]

    assert asyncio.run(scenario()) == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ((), grpc.StatusCode.UNAUTHENTICATED),
        ((("authorization", "Bearer wrong"),), grpc.StatusCode.UNAUTHENTICATED),
        ((("authorization", "Bearer right"),), grpc.StatusCode.OK),
        ((("authorization", "Bearer right"), ("authorization", "other")), grpc.StatusCode.UNAUTHENTICATED),
    ],
    ids=["none", "wrong", "right", "two"],
)
def test_api_key(metadata, code):
    async def scenario():
        async with front_of(FakeEngine("a"), api_keys=["other", "right"]) as client:
            call = client.generate(PROMPT, metadata=metadata)
            if code is grpc.StatusCode.OK:
                return len(await events_of(call)), await call.code(), await status_of(client)
            return 2, (await error_of(call))[0], await status_of(client)

    assert asyncio.run(scenario()) == (2, code, SERVING), "health needs no key"


@pytest.mark.parametrize("refresh", [False, True], ids=["fixed", "refreshed"])
@pytest.mark.parametrize(
    ("require", "present", "fine"),
    [(False, False, True), (True, True, True), (True, False, False)],
    ids=["TLS", "mTLS", "mTLS without a client certificate"],
)
def test_tls(certificates, require, present, fine, refresh):
    cert, key = certificates
    args = Namespace(
        ssl_certfile=str(cert),
        ssl_keyfile=str(key),
        ssl_ca_certs=str(cert) if require else None,
        ssl_cert_reqs=2 if require else 0,
        enable_ssl_refresh=refresh,
    )
    own = {"private_key": key.read_bytes(), "certificate_chain": cert.read_bytes()} if present else {}
    trust = grpc.ssl_channel_credentials(root_certificates=cert.read_bytes(), **own)

    async def scenario():
        async with front_of(FakeEngine("a"), credentials=server_credentials(args), channel_credentials=trust) as client:
            call = client.generate(PROMPT, timeout=300)
            return len(await events_of(call)) if fine else (await error_of(call))[0]

    assert asyncio.run(scenario()) == (2 if fine else grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize(
    ("key", "sent", "own_port", "code"),
    [
        (None, None, False, grpc.StatusCode.PERMISSION_DENIED),
        (None, None, True, grpc.StatusCode.OK),
        ("secret", None, False, grpc.StatusCode.UNAUTHENTICATED),
        ("secret", "wrong", True, grpc.StatusCode.UNAUTHENTICATED),
        ("secret", "secret", False, grpc.StatusCode.OK),
        ("secret", "secret", True, grpc.StatusCode.OK),
    ],
)
def test_admin_calls_need_their_port_or_key(key, sent, own_port, code):
    """The API key of generation is no admin key, and a drain by an admin refuses generation only."""

    async def main():
        [admin_port] = free_ports(0)
        engine = FakeEngine("a")
        engine.get_num_unfinished_requests = lambda: 0
        front = Front(engine, ["api-key"], admin=AdminOptions(admin_port, "127.0.0.1", key))
        port = await front.start("127.0.0.1:0", None)
        metadata = [("authorization", f"Bearer {sent or 'api-key'}")]
        target = f"127.0.0.1:{admin_port if own_port else port}"
        async with (
            grpc.aio.insecure_channel(target) as channel,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as other,
        ):
            drain = admin_pb2_grpc.AdminServiceStub(channel).Drain
            call = drain(admin_pb2.DrainRequest(), metadata=metadata)
            assert await call.code() is code
            generate = inference_pb2_grpc.InferenceServiceStub(other).GenerateStream
            answer = generate(PROMPT, metadata=[("authorization", "Bearer api-key")])
            with contextlib.suppress(grpc.RpcError):
                async for _ in answer:
                    pass
            drained = code is grpc.StatusCode.OK
            assert await answer.code() is (grpc.StatusCode.UNAVAILABLE if drained else grpc.StatusCode.OK)
            if drained:
                assert await drain(admin_pb2.DrainRequest(), metadata=metadata).code() is code
        await front.stop(0)

    asyncio.run(main())


@pytest.mark.parametrize(
    "method", list(pb.DESCRIPTOR.services_by_name["InferenceService"].methods), ids=lambda it: it.name
)
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x05ab"], ids=["no message", "cut short"])
def test_bytes_that_are_no_message(method, data):
    """gRPC's own code is UNKNOWN, or INTERNAL."""

    async def scenario():
        async with front_of(FakeEngine("a")) as client, grpc.aio.insecure_channel(client.address) as channel:
            path = f"/{method.containing_service.full_name}/{method.name}"
            kinds = {
                (False, False): channel.unary_unary,
                (False, True): channel.unary_stream,
                (True, True): channel.stream_stream,
            }
            call = kinds[method.client_streaming, method.server_streaming](path)
            call = call(stream_of(data) if method.client_streaming else data, timeout=300)
            return await call.code()

    assert asyncio.run(scenario()) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_dead_engine_is_reported_while_nobody_calls():
    async def scenario():
        engine = FakeEngine("a")
        async with front_of(engine) as client:
            before = await status_of(client), await status_of(client, "")
            engine.errored = True
            async with asyncio.timeout(300):
                while SERVING in (after := (await status_of(client), await status_of(client, ""))):
                    await asyncio.sleep(0.05)
            await client.front.stop(0)
            return before, after, client.front.engine_died

    assert asyncio.run(scenario()) == ((SERVING, SERVING), (NOT_SERVING, NOT_SERVING), True)


def test_a_client_that_pings_too_often_stays_connected():
    """By default servers close such a connection (`too_many_pings`), also during a long prefill."""

    async def scenario():
        engine = FakeEngine(None, "a")
        async with front_of(engine) as client:
            options = [
                ("grpc.keepalive_time_ms", 1000),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_time_between_pings_ms", 1000),
            ]
            async with grpc.aio.insecure_channel(client.address, options) as channel:
                call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(PROMPT)
                await until(lambda: engine.calls)
                await asyncio.sleep(5)
                engine.release.set()
                return [event.WhichOneof("event") for event in await events_of(call)]

    assert asyncio.run(scenario()) == ["delta", "final"]
