"""Star options of starling.v1, and the fields that its messages share."""

import pytest

from starling.config.star import StarOptions, parse_options
from starling.engine_ext.serving.grpc import messages
from starling.v1 import inference_pb2 as pb


def test_the_message_has_the_options_of_the_model():
    offsets = {"segment_offsets"}  # of the option segments
    assert set(pb.StarOptions.DESCRIPTOR.fields_by_name) - offsets == set(StarOptions.model_fields)


def test_every_mode_has_a_number():
    named = set(pb.StarOptions.Mode.values()) - {pb.StarOptions.MODE_UNSPECIFIED}
    assert set(messages.MODES) == named
    for mode in messages.MODES.values():
        assert parse_options({"mode": mode}, flat=False).mode == mode


@pytest.mark.parametrize(
    ("message", "args"),
    [
        (pb.StarOptions(), {}),
        (pb.StarOptions(mode="MODE_UNSPECIFIED"), {}),
        (pb.StarOptions(mode="MODE_OFF"), {"star": "off"}),
        (pb.StarOptions(mode="MODE_AUTO", min_tokens=0), {"star": "auto", "star_min_tokens": 0}),
        (pb.StarOptions(query_tokens=0), {"star_query_tokens": 0}),
        (pb.StarOptions(min_tokens=2**53 + 1), {"star_min_tokens": 2**53 + 1}),
        (pb.StarOptions(mode=9), {"star": 9}),
        (pb.StarOptions(replicas=0), {"star_replicas": "auto"}),
        (pb.StarOptions(replicas=2), {"star_replicas": 2}),
        (pb.StarOptions(shards=False), {"star_shards": "off"}),
        (pb.StarOptions(adapter=False), {"star_adapter": "off"}),
    ],
    ids=[
        "empty",
        "unspecified",
        "off",
        "zero is set",
        "zero query",
        "64-bit",
        "unnamed mode",
        "auto",
        "replicas",
        "no shards",
        "no adapter",
    ],
)
def test_star_args(message, args):
    assert messages.star_args(message) == args


def test_star_args_over_the_wire():
    words = {"quality": "fast", "block_size": "n/8", "segments": "<file_sep>"}
    every = {field: index for index, field in enumerate(StarOptions.model_fields) if field != "mode"} | words
    every |= {"retention": ["high", "low"]}
    sent = pb.StarOptions(mode="MODE_ON", **every)
    received = messages.star_args(pb.StarOptions.FromString(sent.SerializeToString()))
    every |= {"shards": "on", "adapter": "auto"}
    assert received == {"star": "on"} | {f"star_{field}": value for field, value in every.items()}


def test_both_kinds_of_generate_have_the_same_fields_except_progress():
    def fields(message):
        return [(field.name, field.number, field.type) for field in message.DESCRIPTOR.fields]

    stream = fields(pb.GenerateStreamRequest)
    assert [field for field in stream if field[0] != "progress"] == fields(pb.GenerateRequest) != stream


def test_one_word_of_retention_is_for_the_whole_prompt():
    assert messages.star_args(pb.StarOptions(retention=["low"])) == {"star_retention": "low"}
