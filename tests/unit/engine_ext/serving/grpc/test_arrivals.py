"""What a server takes of a message before it knows who sends it, and of messages that do not come to their end."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from starling.client import clients
from starling.engine_ext.front.cache_salt import digest
from starling.engine_ext.serving.grpc.arrivals import HEALTH_OF_HOST, Arrivals
from starling.engine_ext.serving.grpc.auth import host_of
from starling.engine_ext.serving.grpc.inference import SERVICE
from starling.engine_ext.serving.grpc.server import Front
from starling.engine_ext.serving.grpc.server_options import (
    MAX_ADMIN_BYTES,
    MAX_REQUEST_BYTES,
    MAX_STREAMS,
    AdminOptions,
)
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, front_of
from tests.unit.engine_ext.serving.grpc.http2 import MAX_CONCURRENT_STREAMS, WINDOW, Connection, prefix

METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["InferenceService"].methods]
GENERATE = f"/{SERVICE}/Generate"
HEALTH = "/grpc.health.v1.Health/Check"
ADMIN = "/starling.v1.AdminService/Abort"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
START = prefix(2**20) + b"\x12"  # of a message of 1 MiB, of which no more is sent
KEY = {"authorization": "Bearer key"}
REQUEST = pb.GenerateRequest(text="abc")


@asynccontextmanager
async def connected(*, admin_port: bool = False, certificates=None):
    """A server with the API key `key` and the admin key `admin`, and a connection to one of its ports."""
    credentials = context = None
    if certificates is not None:
        chain, key = certificates
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), chain.read_bytes())])
        context = ssl.create_default_context(cafile=chain)
        context.set_alpn_protocols(["h2"])
    front = Front(FakeEngine("a"), ["key"], admin=AdminOptions(0, "127.0.0.1", "admin"))
    port = await front.start("127.0.0.1:0", credentials)
    connection = await Connection.open(f"127.0.0.1:{front.admin_port if admin_port else port}", context)
    try:
        yield front, connection
    finally:
        await connection.close()
        await front.stop(0)


@pytest.mark.parametrize("tls", [False, True], ids=["plain text", "TLS"])
@pytest.mark.parametrize(
    ("path", "admin_port"),
    [*((f"/{SERVICE}/{name}", False) for name in METHODS), (ADMIN, False), (ADMIN, True), (REFLECTION, True)],
)
def test_a_call_without_a_key_is_refused_before_its_message(path, admin_port, tls, certificates):
    async def scenario():
        async with connected(admin_port=admin_port, certificates=certificates if tls else None) as (_, connection):
            call = connection.call(path)
            await connection.send(call, START)
            await connection.until(lambda: call in connection.ended)

    asyncio.run(scenario())


def test_a_server_takes_no_more_of_messages_that_wait_than_a_window():
    """All but one of a client's messages wait. Of those the server takes no more than the first window."""

    async def scenario():
        async with connected() as (front, connection):
            front.arrivals.arrivals = Arrivals(2, 1, 60, host_of)
            calls = [connection.call(GENERATE, **KEY) for _ in range(4)]
            for call in calls:
                await connection.send(call, prefix(2**20) + b"\x12" * (WINDOW - 5))
            first, *others = calls
            await connection.until(lambda: connection.windows[first] >= 2**20 - WINDOW)
            await connection.send(first, b"\x12" * (2**20 - 2 * WINDOW))
            return [connection.windows[call] for call in others]

    assert asyncio.run(scenario()) == [0, 0, 0]


@pytest.mark.parametrize("path", [GENERATE, f"/{SERVICE}/GenerateUploadStream", HEALTH])
def test_a_message_that_does_not_come_to_its_end_ends_its_call(path, monkeypatch):
    monkeypatch.setattr("starling.engine_ext.serving.grpc.arrivals.SECONDS", 0.1)
    monkeypatch.setattr("starling.engine_ext.serving.grpc.arrivals.HEALTH_SECONDS", 0.1)
    monkeypatch.setattr("starling.engine_ext.serving.grpc.upload.IDLE_SECONDS", 0.1)

    async def scenario():
        async with connected() as (_, connection):
            calls = [connection.call(path, **KEY), connection.call(path, **KEY)]
            await connection.send(calls[0], START)  # of the other call nothing is sent
            await connection.until(lambda: set(calls) <= connection.ended)

    asyncio.run(scenario())


def test_a_client_that_stalls_leaves_room_for_others():
    async def scenario():
        async with front_of(FakeEngine("a"), api_keys=["key", "other"]) as client:
            front = client.front
            front.arrivals.arrivals = Arrivals(2, 1, 60, front.auth.client_of)
            connection = await Connection.open(client.address)
            for _ in range(3):
                await connection.send(connection.call(GENERATE, **KEY), START)
            await connection.until(lambda: connection.windows[1] > WINDOW)
            reply = await client.stub.Generate(REQUEST, metadata=[("authorization", "Bearer other")], timeout=300)
            await connection.close()
            return reply.choices[0].text

    assert asyncio.run(scenario()) == "a"


def test_a_key_names_one_client_however_it_is_sent():
    async def scenario():
        async with front_of(FakeEngine("a"), api_keys=["key", "other"]) as client:
            names = []
            client_of = client.front.arrivals.arrivals.client_of

            def noted(context):
                names.append(client_of(context))
                return names[-1]

            client.front.arrivals.arrivals.client_of = noted
            for value in ("Bearer key", "bEarer key", "BEARER key", "Bearer other"):
                await client.stub.Generate(REQUEST, metadata=[("authorization", value)], timeout=300)
            return names

    first, *same, other = asyncio.run(scenario())
    assert same == [first] * 2
    assert first.endswith(f" {digest('key').hex()}") and other.endswith(f" {digest('other').hex()}")
    assert first.split()[0] == other.split()[0], "their address"


def test_without_keys_an_address_names_a_client():
    """What a client sends as a key is not checked there, so it may not name the client."""

    async def scenario():
        async with front_of(FakeEngine("a")) as client:
            client_of, names = client.front.auth.client_of, set()
            client.front.arrivals.arrivals.client_of = lambda context: names.add(client_of(context)) or "client"
            for key in ("one", "two"):
                await client.stub.Generate(REQUEST, metadata=[("authorization", f"Bearer {key}")], timeout=300)
            return names

    assert len(asyncio.run(scenario())) == 1


def test_the_limits_of_a_connection():
    async def scenario():
        async with connected() as (_, connection):
            return connection.settings[MAX_CONCURRENT_STREAMS]

    assert asyncio.run(scenario()) == MAX_STREAMS


@pytest.mark.parametrize(("admin_port", "limit"), [(False, MAX_REQUEST_BYTES), (True, MAX_ADMIN_BYTES)])
def test_a_longer_message_is_refused_by_its_prefix(admin_port, limit):
    async def scenario():
        async with connected(admin_port=admin_port) as (_, connection):
            key = {"authorization": "Bearer admin"} if admin_port else KEY
            call = connection.call(ADMIN if admin_port else GENERATE, **key)
            await connection.send(call, prefix(limit + 1))
            await connection.until(lambda: call in connection.ended)

    asyncio.run(scenario())


def test_a_compressed_message_is_refused():
    """A message of 8 MiB could become one of 8 GiB."""

    async def scenario():
        engine = FakeEngine("a")
        async with front_of(engine) as client, grpc.aio.insecure_channel(client.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                text = pb.GenerateRequest(text="a" * 10_000)
                await stub.Generate(text, compression=grpc.Compression.Gzip, timeout=300)
            return refused.value.code(), engine.calls

    assert asyncio.run(scenario()) == (grpc.StatusCode.UNIMPLEMENTED, [])


def test_an_ordinary_long_prompt_fits_one_message():
    million = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(10**6)))
    assert million.ByteSize() < MAX_REQUEST_BYTES == clients.SERVER_MESSAGE_BYTES
    assert pb.GenerateRequest(text="a" * 4_000_000).ByteSize() < MAX_REQUEST_BYTES


def test_health_calls_of_one_address_are_few():
    """Watch too, which may last for ever."""

    async def scenario():
        async with front_of(FakeEngine("a")) as client, grpc.aio.insecure_channel(client.address) as channel:
            stub, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
            watches = [stub.Watch(request) for _ in range(HEALTH_OF_HOST)]
            for watch in watches:
                await watch.read()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Check(request, timeout=300)
            watches[0].cancel()
            async with asyncio.timeout(300):
                while client.front.arrivals.health_calls.hosts.total() == HEALTH_OF_HOST:
                    await asyncio.sleep(0.01)
            return refused.value.code(), (await stub.Check(request, timeout=300)).status

    serving = health_pb2.HealthCheckResponse.SERVING
    assert asyncio.run(scenario()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, serving)
