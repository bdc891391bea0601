"""GenerateUploadStream: its parts become one request, refusals, and the memory for uploads."""

import asyncio
from contextlib import suppress

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from vllm.exceptions import QueueOverflowError, VLLMValidationError

from starling.engine_ext.front.bounds import UPLOAD
from starling.engine_ext.serving.grpc.arrivals import SlowMessageError
from starling.engine_ext.serving.grpc.messages import UploadMemoryError
from starling.engine_ext.serving.grpc.prompt_inputs import PromptLimit
from starling.engine_ext.serving.grpc.server_options import MAX_REQUEST_BYTES
from starling.engine_ext.serving.grpc.upload import (
    CHARACTER_BYTES,
    ID_BYTES,
    PIECE_BYTES,
    Quota,
    Upload,
    as_upload_event,
    messages,
    upload_quota,
)
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, front_of

Part = pb.GenerateUploadStreamRequest
Event = pb.GenerateUploadStreamResponse
LIMIT = PromptLimit(1000, 8000)


def head(**fields) -> Part:
    return Part(head=pb.GenerateStreamRequest(**fields))


def ids(*values: int) -> Part:
    return Part(token_ids=pb.TokenIds(ids=values))


async def stream(parts):
    for part in parts:
        yield part


async def received(parts, quota=None, client="me", limit=LIMIT) -> pb.GenerateStreamRequest:
    with (quota or upload_quota(1000)).room(client) as room:
        return await Upload(room, limit).receive(parts)


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
    assert asyncio.run(received(stream(parts))) == request_


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
        asyncio.run(received(stream(parts)))
    assert refused.value.parameter == parameter
    assert says in str(refused.value)


class CountedEngine(FakeEngine):
    """Notes the memory of uploads at each step."""

    uploads: Quota

    async def render_cmpl_async(self, prompts, tok_params, prompt_extras):
        self.while_tokenising = self.uploads.used.total()
        return await super().render_cmpl_async(prompts, tok_params, prompt_extras)

    async def generate(self, *args, **kwargs):
        self.while_generating = self.uploads.used.total()
        async for output in super().generate(*args, **kwargs):
            yield output


def test_an_upload_keeps_its_room_until_it_is_tokenised():
    engine = CountedEngine("a")

    async def scenario():
        async with front_of(engine) as client:
            engine.uploads = client.front.inference.uploads
            [_ async for _ in client.stub.GenerateUploadStream(stream([head(), ids(*range(300))]))]
            return engine.uploads.used

    assert asyncio.run(scenario()) == {}
    assert engine.while_tokenising == 2 * MAX_REQUEST_BYTES + 300 * ID_BYTES
    assert engine.while_generating == 0


@pytest.mark.parametrize(
    ("part", "limit", "says"),
    [
        (ids(*range(60)), PromptLimit(100, 8000), "120 token ids or more"),
        (Part(text="x" * 60), PromptLimit(10, 100), "120 characters or more"),
    ],
    ids=["ids", "text"],
)
def test_an_upload_longer_than_any_prompt_is_refused_as_it_comes_in(part, limit, says):
    """The third part is never asked for."""

    async def parts():
        yield head()
        yield part
        yield part
        raise AssertionError("the upload was refused too late")

    with pytest.raises(VLLMValidationError, match=says):
        asyncio.run(received(parts(), limit=limit))


def test_many_empty_pieces_take_no_memory():
    """A client could send them for ever."""
    quota = upload_quota(1000)

    async def scenario():
        with quota.room("me") as room:
            upload = Upload(room, LIMIT)
            await upload.receive(stream([head(), *[Part(text="")] * 1000, *[Part(text="a")] * 10]))
            return upload.texts, room.size

    texts, size = asyncio.run(scenario())
    assert (texts, size) == ([], 2 * MAX_REQUEST_BYTES + 10 * (PIECE_BYTES + CHARACTER_BYTES))


@pytest.mark.parametrize("piece", [Part(text=""), Part(text="a")], ids=["empty", "one character"])
def test_an_upload_has_a_bound_of_pieces(piece):
    """The event loop takes each: 30,000 empty ones took 5 seconds of it."""
    request = asyncio.run(received(stream([head(), *[piece] * UPLOAD.limit])))
    assert request.text == piece.text * UPLOAD.limit

    async def one_more():
        yield head()
        for _ in range(UPLOAD.limit + 1):
            yield piece
        raise AssertionError("the upload was refused too late")

    with pytest.raises(VLLMValidationError, match=f"{UPLOAD.limit + 1} pieces, and may have {UPLOAD.limit} at most"):
        asyncio.run(received(one_more()))


def test_an_upload_that_stalls_leaves_room_for_other_clients():
    """A client's share is full: its next upload is refused, the one of another client is not."""
    quota = Quota(4 * 2 * MAX_REQUEST_BYTES, 2 * MAX_REQUEST_BYTES + 10_000, UploadMemoryError)

    async def scenario():
        async def half():
            yield head()
            await asyncio.Event().wait()

        stalled = asyncio.create_task(received(half(), quota))
        while not quota.used["me"]:
            await asyncio.sleep(0)
        with pytest.raises(UploadMemoryError):
            await received(stream([head(text="a")]), quota)
        other = await received(stream([head(text="a")]), quota, client="other")
        stalled.cancel()
        with suppress(asyncio.CancelledError):
            await stalled
        return other.text, (await received(stream([head(text="b")]), quota)).text

    assert asyncio.run(scenario()) == ("a", "b")
    assert quota.used == {}


def test_a_client_can_upload_the_longest_prompt():
    for tokens in (1000, 10**6, 10**8):
        quota = upload_quota(tokens)
        assert quota.of_client >= 2 * MAX_REQUEST_BYTES + tokens * ID_BYTES
        assert quota.total == 2 * quota.of_client


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
                await asyncio.Event().wait()

            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in client.stub.GenerateUploadStream(endless()):
                    pass
            return refused.value.code()

    assert asyncio.run(asyncio.wait_for(scenario(), 300)) == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_memory_of_a_cancelled_upload_is_released():
    async def scenario():
        async with front_of(FakeEngine("ab")) as client:
            memory = client.front.inference.uploads

            async def endless():
                yield head(text="x" * 600)
                await asyncio.Event().wait()

            call = client.stub.GenerateUploadStream(endless())
            async with asyncio.timeout(300):
                while not memory.used.total():
                    await asyncio.sleep(0.01)
                call.cancel()
                while memory.used.total():
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_an_upload_in_ever_more_pieces_ends():
    async def endless():
        while True:
            yield ids()
            await asyncio.sleep(0)

    async def scenario():
        async for _ in messages(endless(), 60, 0.05):
            pass

    with pytest.raises(SlowMessageError, match="did not come to its end within 0 s"):
        asyncio.run(scenario())
