"""How calls of the Python client are repeated, and how they end, against the gRPC server on a fake engine."""

import asyncio
import json

import grpc
import pytest
from vllm.exceptions import QueueOverflowError
from vllm.v1.engine.exceptions import EngineDeadError

from starling.client import AsyncClient, Client, clients
from starling.engine_ext.serving.grpc import messages
from tests.unit.engine_ext.serving.grpc.client_calls import Call
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, front_of
from tests.unit.engine_ext.serving.grpc.test_inference import DEADLINES


class FullAtFirst(FakeEngine):
    """Refuses the first ``times`` requests."""

    def __init__(self, times: int, *script) -> None:
        super().__init__(*script)
        self.times = times

    def check_admission(self, n: int) -> None:
        super().check_admission(n)
        if len(self.admitted) <= self.times:
            raise QueueOverflowError


@pytest.fixture
def soon(monkeypatch):
    """The server's pushback is 50 ms; without it the client would wait for 10 minutes before it calls again."""
    channel_options = clients.channel_options

    def with_long_waits(*args):
        made = dict(channel_options(*args))
        if config := json.loads(made.get("grpc.service_config", "{}")):
            config["methodConfig"][0]["retryPolicy"] |= {"initialBackoff": "600s", "maxBackoff": "600s"}
            made["grpc.service_config"] = json.dumps(config)
        return list(made.items())

    monkeypatch.setattr(clients, "channel_options", with_long_waits)
    monkeypatch.setattr(messages, "PUSHBACK", ("grpc-retry-pushback-ms", "50"))


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    ("method", "fields"),
    [("stream", {}), ("generate", {}), ("stream", {"upload": True})],
    ids=["stream", "one", "upload"],
)
def test_calls_are_retried_after_the_servers_pushback(kind, soon, method, fields, times):
    engine = FullAtFirst(times, "a")
    # Longer than gRPC's default retry buffer of 256 KiB: it would not retry the call, and uploads would abort.
    call = Call(kind, engine, method)("x" * 2**20, timeout=300, **fields)
    assert call.error is None, "it waits as long as the server says"
    assert len(engine.admitted) == times + 1 + bool(fields), "an upload is checked before and after it is received"
    assert len(engine.calls) == 1
    assert 0.05 * times * 0.8 < call.seconds


@pytest.mark.parametrize("retries", [0, 1])
def test_retries_end(kind, soon, retries):
    engine = FakeEngine(refuses=QueueOverflowError())
    error = Call(kind, engine, retries=retries)("abc").error
    assert (error.code, error.retry_after) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0)
    assert len(engine.admitted) == 1 + retries


@pytest.mark.parametrize("retries", [-1, 5])
def test_more_retries_than_grpc_supports_are_refused(retries):
    with pytest.raises(ValueError, match="0 to 4"):
        Client("localhost:1", retries=retries)


def test_nothing_is_repeated_after_an_event(kind):
    engine = FakeEngine("a", EngineDeadError())
    call = Call(kind, engine)("abc")
    assert (call.kinds, call.error.code) == (["delta"], grpc.StatusCode.UNAVAILABLE)
    assert len(engine.admitted) == 1


def test_the_deadline_holds_for_the_waits_too(kind, monkeypatch):
    monkeypatch.setattr(messages, "PUSHBACK", ("grpc-retry-pushback-ms", "1000000"))
    for seconds in DEADLINES:
        engine = FakeEngine(refuses=QueueOverflowError())
        call = Call(kind, engine)("abc", timeout=seconds)
        if engine.admitted:
            break
    assert call.error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(engine.admitted) == 1


@pytest.mark.parametrize("method", ["stream", "generate"])
def test_the_deadline_ends_the_request(kind, method):
    for seconds in DEADLINES:
        engine = FakeEngine("a", None)
        call = Call(kind, engine, method)("abc", timeout=seconds)
        if engine.calls:
            break
    assert call.error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(engine.ended) == 1


@pytest.mark.parametrize("way", ["break", "close"])
@pytest.mark.parametrize("upload", [False, True], ids=["message", "upload"])
def test_leaving_the_loop_ends_the_request(kind, way, upload):
    def first(client):
        if way == "break":
            for event in client.stream("abc", upload=upload):
                return event
        events = client.stream("abc", upload=upload)
        next(events)
        events.close()

    async def first_of(client):
        if way == "break":
            async for event in client.stream("abc", upload=upload):
                return event
        events = client.stream("abc", upload=upload)
        await anext(events)
        await events.aclose()

    async def scenario():
        engine = FakeEngine("a", None)
        async with front_of(engine) as front, asyncio.timeout(300):
            client = Client(front.address) if kind == "blocking" else AsyncClient(front.address)
            await (asyncio.to_thread(first, client) if kind == "blocking" else first_of(client))
            while not engine.ended:
                await asyncio.sleep(0.01)
            closing = client.close()
            if closing is not None:
                await closing

    asyncio.run(scenario())
