"""GenerateUploadStream: its parts become one request, refusals, and the memory for uploads."""

import asyncio
from contextlib import suppress

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from vllm.exceptions import QueueOverflowError, VLLMValidationError

from engine_ext.serving.errors import UploadMemoryError
from engine_ext.serving.grpc.upload import UploadMemory, as_upload_event
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, front_of

Part = pb.GenerateUploadStreamRequest
Event = pb.GenerateUploadStreamResponse


def head(**fields) -> Part:
    return Part(head=pb.GenerateStreamRequest(**fields))


def ids(*values: int) -> Part:
    return Part(token_ids=pb.TokenIds(ids=values))


async def stream(parts):
    for part in parts:
        yield part


async def received(parts, memory=None) -> pb.GenerateStreamRequest:
    with (memory or UploadMemory()).upload() as upload:
        return await upload.receive(stream(parts))


@pytest.mark.parametrize(
    ("parts", "request_"),
    [
        ([head(text="a")], pb.GenerateStreamRequest(text="a")),
        ([head(), Part(text="a"), Part(text="b")], pb.GenerateStreamRequest(text="ab")),
        ([head(text="a"), Part(text=""), Part(text="b")], pb.GenerateStreamRequest(text="ab")),
        ([head(), ids(1, 2), ids(), ids(3)], pb.GenerateStreamRequest(token_ids={"ids": [1, 2, 3]})),
        ([head(token_ids={"ids": [1]}), ids(2)], pb.GenerateStreamRequest(token_ids={"ids": [1, 2]})),
        ([head(priority=0), ids(2)], pb.GenerateStreamRequest(priority=0, token_ids={"ids": [2]})),
        ([head(request_id="x")], pb.GenerateStreamRequest(request_id="x")),
    ],
    ids=["head alone", "text", "text from the head on", "ids", "ids from the head on", "presence", "no prompt"],
)
def test_pieces_are_put_together(parts, request_):
    assert asyncio.run(received(parts)) == request_


REFUSED = {
    "nothing": ([], "head", "empty"),
    "no head": ([ids(1)], "head", "first message"),
    "two heads": ([head(), head()], "head", "first message"),
    "empty head": ([Part()], "head", "first message"),
    "empty part": ([head(), Part()], None, "a piece is text or token_ids"),
    "mixed": ([head(), ids(1), Part(text="a")], "text", "are all token_ids"),
    "not the head's kind": ([head(text="a"), ids(1)], "token_ids", "are all text"),
    "chat": ([head(chat={"messages": [{"role": "user"}]})], "chat", "GenerateStream"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_out_of_order(case):
    parts, parameter, says = REFUSED[case]
    with pytest.raises(VLLMValidationError) as refused:
        asyncio.run(received(parts))
    assert refused.value.parameter == parameter
    assert says in str(refused.value)


def test_memory_is_limited_and_released():
    memory = UploadMemory(total=1000)
    with pytest.raises(VLLMValidationError, match="at most 1000 bytes"):
        asyncio.run(received([head(text="x" * 600), Part(text="x" * 600)], memory))
    assert memory.used == 0

    async def two():
        async def half():
            yield head(text="x" * 600)
            await asyncio.sleep(10)

        async def hold():
            with memory.upload() as upload:
                await upload.receive(half())

        holding = asyncio.create_task(hold())
        await asyncio.sleep(0)
        assert memory.used > 600
        with pytest.raises(UploadMemoryError):
            await received([head(text="x" * 600)], memory)
        holding.cancel()
        with suppress(asyncio.CancelledError):
            await holding
        return await received([head(text="x" * 600)], memory)

    assert asyncio.run(two()).text == "x" * 600
    assert memory.used == 0


def test_both_responses_have_the_same_events():
    of = [message.DESCRIPTOR.oneofs_by_name["event"].fields for message in (pb.GenerateStreamResponse, Event)]
    assert [(field.name, field.number) for field in of[0]] == [(field.name, field.number) for field in of[1]]
    event = pb.GenerateStreamResponse(delta=pb.Delta(text="a", index=1))
    assert as_upload_event(event).SerializeToString() == event.SerializeToString()


def test_an_upload_is_served_as_its_request():
    engine = FakeEngine("ab", "c")

    async def scenario():
        async with front_of(engine) as client:
            parts = [head(sampling={"max_tokens": 5}), ids(1, 2), ids(3)]
            events = [event async for event in client.stub.GenerateUploadStream(stream(parts))]
            whole = pb.GenerateStreamRequest(sampling={"max_tokens": 5}, token_ids={"ids": [1, 2, 3]})
            return events, [event async for event in client.generate(whole)]

    uploaded, whole = asyncio.run(scenario())
    assert [event.SerializeToString() for event in uploaded] == [event.SerializeToString() for event in whole]
    assert engine.rendered[0] == engine.rendered[1]
    assert engine.calls[0].params == engine.calls[1].params


def test_a_refused_upload_names_the_field_and_keeps_nothing():
    async def scenario():
        async with front_of(FakeEngine("ab")) as client:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in client.stub.GenerateUploadStream(stream([ids(1)])):
                    pass
            return refused.value

    error = asyncio.run(scenario())
    details = error_details_pb2.BadRequest()
    assert rpc_status.from_call(error).details[0].Unpack(details)
    assert [violation.field for violation in details.field_violations] == ["head"]


def test_a_full_engine_refuses_before_the_upload():
    async def scenario():
        async with front_of(FakeEngine(refuses=QueueOverflowError())) as client:

            async def endless():
                yield head()
                await asyncio.sleep(30)

            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in client.stub.GenerateUploadStream(endless()):
                    pass
            return refused.value.code()

    assert asyncio.run(asyncio.wait_for(scenario(), 10)) == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_memory_of_a_cancelled_upload_is_released():
    async def scenario():
        async with front_of(FakeEngine("ab")) as client:
            memory = client.front.inference.uploads

            async def endless():
                yield head(text="x" * 600)
                await asyncio.sleep(30)

            call = client.stub.GenerateUploadStream(endless())
            async with asyncio.timeout(10):
                while not memory.used:
                    await asyncio.sleep(0.01)
                call.cancel()
                while memory.used:
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())
