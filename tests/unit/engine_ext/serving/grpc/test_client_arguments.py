"""What the Python client makes of its arguments, and what it refuses, without a server."""

import dataclasses
import pickle

import grpc
import pytest

from starling.client import Client, StarlingError, replies, requests
from starling.config.star import FIELD_OF, StarOptions
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.client_calls import CHAT


def test_a_list_of_texts_is_a_prompt_of_texts():
    sent = requests.generate_request(["head", "question"], {})
    assert sent == pb.GenerateStreamRequest(texts=pb.Texts(texts=["head", "question"]))
    with pytest.raises(TypeError, match=r"it is several texts\. Allowed: text or messages"):
        requests.tokenize_request(["head", "question"], None, None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"temprature": 1},
            "temprature is refused.*did you mean temperature. Allowed: temperature, .*, star",
        ),
        ({"star_blocksize": 8}, "'star_blocksize' is refused.*did you mean star_block_size. Allowed: star, star_min_t"),
        ({"progress": True}, "progress is refused"),
        ({"text": "x"}, "text is refused"),
        ({"sampling": {}}, "sampling is refused"),
        ({"star": {"blocks": 3}}, "'blocks' is refused.*Allowed: mode, .*block_size"),
        ({"star": {"mode": "yes"}}, "'yes' is refused. Allowed: off, on, auto"),
        ({"star": {"shards": "maybe"}}, "star_shards='maybe' is refused. Allowed: off, on"),
        ({"star_adapter": "a/folder"}, "star_adapter='a/folder' is refused. Allowed: off, auto"),
        ({"star": {"dense_heads": "a tenth"}}, "dense_heads='a tenth' is refused. Allowed: a share of the KV heads"),
        ({"star": {"dense_heads": True}}, "dense_heads=True is refused"),
        ({"temperature": "warm"}, "temperature='warm' is refused"),
        ({"top_k": -1}, "top_k=-1 is refused"),
        ({"add_generation_prompt": True}, r"add_generation_prompt is refused: there are no messages"),
        ({"messages": CHAT}, "both of prompt and messages are given. Allowed: one of them"),
        ({"star": 5}, "star mode '5' is refused. Allowed: off, on, auto"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_are_refused(fields, says):
    """Before the call, and before the first event is requested."""
    with pytest.raises((TypeError, ValueError), match=says):
        Client("localhost:1").generate("abc", **fields)
    if "progress" not in fields:
        with pytest.raises((TypeError, ValueError), match=says):
            Client("localhost:1").stream("abc", **fields)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "neither of prompt and messages"),
        (5, "of type int is refused"),
        (b"abc", "of type bytes is refused"),
        (CHAT[0], "of type dict is refused"),
        (["a", 5], "refused"),
        (CHAT, r"it is messages\. Allowed: messages=\[\.\.\.\]"),
    ],
)
def test_prompts_of_unknown_kinds(prompt, says):
    with pytest.raises(TypeError, match=says):
        requests.generate_request(prompt, {})


TEXT, IMAGE = {"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "http://a"}}


def test_parts_of_text_are_lines_of_a_message():
    """OpenAI's list of parts, for which protobuf says `bad argument type for built-in operation`."""
    user = {"role": "user", "content": [TEXT, "two"]}
    request = requests.generate_request(None, {}, messages=[{"role": "system", "content": []}, user])
    assert [message.content for message in request.chat.messages] == ["", "one\ntwo"]
    assert [message.role for message in request.chat.messages] == ["system", "user"]
    assert requests.tokenize_request(None, [user], None).chat.messages == request.chat.messages[1:]


def test_a_part_that_is_no_text_is_named():
    says = r"messages\[1\]\.content\[1\]=\{.*image_url.* is refused: it is no text\. Allowed: text, .* images over HTTP"
    with pytest.raises(ValueError, match=says):
        requests.generate_request(None, {}, messages=[*CHAT[:1], {"role": "user", "content": [TEXT, IMAGE]}])


@pytest.mark.parametrize("key", ["schlüssel", "a\nb"])
def test_a_key_that_grpc_can_not_send_is_refused(key):
    """gRPC says `metadata was invalid` at the first call. The key itself is in no message."""
    with pytest.raises(ValueError, match="api_key is refused: gRPC sends printable ASCII only") as refused:
        Client("localhost:1", api_key=key)
    assert key not in str(refused.value)


def test_messages_that_are_no_list_and_other_fields_are_named():
    with pytest.raises(TypeError, match=r"messages of type str is refused. Allowed: a list of messages, each wi"):
        requests.generate_request(None, {}, messages="hello")
    with pytest.raises(TypeError, match=r"messages\[1\]\.text is refused: there is no such field\. Allowed: role, con"):
        requests.generate_request(None, {}, messages=[CHAT[0], {"role": "user", "text": "x"}])


def test_an_address_that_is_a_url_is_refused():
    with pytest.raises(ValueError, match=r"address='http://127.0.0.1:1' is refused: it is a URL. Allowed: HOST:PORT"):
        Client("http://127.0.0.1:1")


@pytest.mark.parametrize("message", [{"role": "user", "content": 1}, {"say": "x"}, "hi"])
def test_messages_of_unknown_kinds(message):
    with pytest.raises((TypeError, ValueError), match="is refused"):
        requests.generate_request(None, {}, messages=[message])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0, "seed": None}, {"sampling": {"temperature": 0}}),
        ({"stop": ["a", "b"], "bad_words": "c"}, {"sampling": {"stop": ["a", "b"], "bad_words": ["c"]}}),
        ({"extra_args": {"big": 2**53 + 1}}, {"sampling": {"extra_args": '{"big": 9007199254740993}'}}),
        (
            {"structured_outputs": {"choices": ["yes", "no"]}},
            {"sampling": {"structured_outputs": {"choices": {"choices": ["yes", "no"]}}}},
        ),
        (
            {"structured_outputs": {"json_schema": {"type": "object"}}},
            {"sampling": {"structured_outputs": {"json_schema": '{"type": "object"}'}}},
        ),
        ({"star": {"star": "auto", "star_block_size": "n/4"}}, {"star": {"mode": "MODE_AUTO", "block_size": "n/4"}}),
        ({"star": "On", "star_block_size": 4096}, {"star": {"mode": "MODE_ON", "block_size": "4096"}}),
        ({"star": False}, {"star": {"mode": "MODE_OFF"}}),
        ({"star": {"anchor_size": 0}}, {"star": {"anchor_size": 0}}),
        ({"star": {"shards": "on"}}, {"star": {"shards": True}}),
        ({"star_adapter": "auto"}, {"star": {"adapter": True}}),
        ({"star_adapter": "off"}, {"star": {"adapter": False}}),
        ({"star": "on", "star_dense_heads": " 10% "}, {"star": {"mode": "MODE_ON", "dense_heads": 0.1}}),
        ({"star": {"dense_heads": "0.25"}}, {"star": {"dense_heads": 0.25}}),
        ({"star": {"star_shards": "off"}}, {"star": {"shards": False}}),
        ({"request_id": "r", "progress": True, "priority": 0}, {"request_id": "r", "progress": True, "priority": 0}),
    ],
)
def test_what_is_sent(fields, expected):
    assert requests.generate_request("abc", fields) == pb.GenerateStreamRequest(text="abc", **expected)


def test_names_are_the_servers():
    assert {name: "mode" if name == "star" else name.removeprefix("star_") for name in FIELD_OF} == FIELD_OF
    assert sorted({*requests.STAR} - {"segment_offsets"}) == sorted(FIELD_OF.values())
    assert list(requests.MODES) == ["off", "on", "auto"]


def test_star_options_of_a_python_engine_can_be_sent():
    """StarOptions is of another package, which the client does not import."""
    given = StarOptions(mode="on", block_size="n/4", segments=(0, 4), dense_heads=0.25)
    made = requests.generate_request([1], {"star": given})
    expected = {"mode": "on", "block_size": "n/4", "segments": [0, 4], "dense_heads": 0.25}
    assert made == requests.generate_request([1], {"star": expected})
    assert not made.star.HasField("replicas"), "what was not given is the server's"


def test_the_types_have_the_names_of_the_messages():
    assert [*requests.Sampling.__annotations__] == requests.SAMPLING
    assert {*requests.StarFields.__annotations__} == {*FIELD_OF} - {"star"}
    own = {*requests.StreamFields.__annotations__} - {*requests.SAMPLING} - {*FIELD_OF}
    assert own == {*requests.REQUEST, requests.CHAT_FIELD} - {"star"}
    for message, kind in replies.KINDS.items():
        names = {field.name for field in message.DESCRIPTOR.fields}
        assert {field.name for field in dataclasses.fields(kind)} == names, kind


def test_replies_are_read_field_by_field():
    chosen = pb.TokenLogprobs(chosen=pb.Logprob(token_id=4, logprob=-0.5, rank=2, text="a"))
    final = pb.Final(finish_reason="FINISH_REASON_LENGTH", stop_token_id=0, plan=pb.Plan(why="short", attention=1))
    delta = pb.Delta(text="a", token_ids=[4], index=1, logprobs=[chosen, pb.TokenLogprobs()])
    got = replies.read_event(pb.GenerateStreamResponse(delta=delta))
    token = replies.TokenLogprobs(replies.Logprob(4, -0.5, 2, "a"), [])
    assert got == replies.Delta("a", [4], 1, [token, replies.TokenLogprobs(None, [])])
    got = replies.read_event(pb.GenerateStreamResponse(final=final))
    assert (got.finish_reason, got.stop_string, got.stop_token_id) == ("length", None, 0)
    assert (got.plan.attention, got.plan.why, got.plan.document_sources) == ("dense", "short", [])
    assert replies.read_event(pb.GenerateStreamResponse()) is None, "a newer server's event"
    assert replies.read(pb.Choice(finish_reason=77)).finish_reason == "77", "a newer server's reason"


def test_both_streams_have_the_same_events():
    """The client reads the events of an upload as those of GenerateStream."""
    fields = [
        [(field.name, field.number, field.message_type) for field in message.DESCRIPTOR.fields]
        for message in (pb.GenerateStreamResponse, pb.GenerateUploadStreamResponse)
    ]
    assert fields[0] == fields[1]


def test_an_error_can_cross_processes():
    error = StarlingError(grpc.StatusCode.INVALID_ARGUMENT, "no", "sampling.top_p", None)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.field) == ("INVALID_ARGUMENT: no", error.code, "sampling.top_p")
