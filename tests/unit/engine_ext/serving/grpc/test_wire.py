"""The number of fields of messages that protobuf itself has written, and what a server says of too many."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError

from starling.engine_ext.front.bounds import FIELDS
from starling.engine_ext.serving.grpc import arrivals
from starling.engine_ext.serving.grpc.arrivals import check_num_fields, method_of
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, front_of

REQUEST = pb.GenerateStreamRequest


def too_many(message) -> bool:
    try:
        check_num_fields(message.SerializeToString(), message.DESCRIPTOR)
    except VLLMValidationError as error:
        assert str(error.args[0]) == (
            f"the message is refused: it has {FIELDS.limit + 1} fields, and may have {FIELDS.limit} at most."
        )
        return True
    return False


def test_each_text_is_a_field():
    """The field of the texts is one more."""
    assert not too_many(REQUEST(texts=pb.Texts(texts=[""] * (FIELDS.limit - 1))))
    assert too_many(REQUEST(texts=pb.Texts(texts=[""] * FIELDS.limit)))
    assert too_many(pb.GenerateUploadStreamRequest(head=REQUEST(texts=pb.Texts(texts=[""] * FIELDS.limit))))


def test_so_are_those_in_other_messages():
    assert too_many(REQUEST(text="a", sampling=pb.SamplingParams(stop=["a"] * FIELDS.limit)))
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="a")] * (FIELDS.limit // 3 + 1))
    assert too_many(REQUEST(chat=chat))


def test_token_ids_and_long_texts_and_entries_of_a_map_are_one_field():
    assert not too_many(REQUEST(token_ids=pb.TokenIds(ids=range(1_000_000))))
    assert not too_many(REQUEST(text="a" * 2**22))
    entries = dict.fromkeys(range(FIELDS.limit - 2), 0.5)
    assert not too_many(REQUEST(text="a", sampling=pb.SamplingParams(logit_bias=entries)))
    assert too_many(REQUEST(text="a", sampling=pb.SamplingParams(logit_bias=entries | {10**6: 0.5})))


def test_token_ids_that_are_not_packed_are_fields():
    """protobuf reads them too: a tag and an id each."""
    ids = b"\x08\x07" * (FIELDS.limit + 1)
    assert list(pb.TokenIds.FromString(ids).ids[:2]) == [7, 7]
    with pytest.raises(VLLMValidationError):
        check_num_fields(ids, pb.TokenIds.DESCRIPTOR)


@given(st.binary(max_size=200))
def test_what_is_no_message_is_left_to_the_parser(data):
    for limit in (0, 3, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arrivals, "FIELDS", arrivals.FIELDS.__class__("the message", limit, "fields"))
            try:
                check_num_fields(data, REQUEST.DESCRIPTOR)
            except VLLMValidationError:
                assert len(data) > limit


def test_every_method_of_the_server_is_found():
    assert method_of("/starling.v1.InferenceService/GenerateStream").input_type is REQUEST.DESCRIPTOR
    assert method_of("/starling.v1.InferenceService/None") is None
    assert method_of("/None/None") is None


async def refusal(call) -> grpc.aio.AioRpcError:
    async with front_of(FakeEngine()) as client:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(client.stub)
    return raised.value


def test_a_server_refuses_a_message_with_too_many_fields():
    many = REQUEST(texts=pb.Texts(texts=[""] * FIELDS.limit))
    error = asyncio.run(refusal(lambda stub: stub.GenerateStream(many).read()))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "the message is refused" in error.details()


def test_so_does_an_upload():
    many = pb.GenerateUploadStreamRequest(head=REQUEST(sampling=pb.SamplingParams(stop=[""] * FIELDS.limit)))
    error = asyncio.run(refusal(lambda stub: stub.GenerateUploadStream(iter([many])).read()))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "the message is refused" in error.details()
