"""Messages that are none: a holder of shards refuses and logs them, and goes on. So does the replica that asks it."""

from __future__ import annotations

import logging
import threading
import time

import msgspec
import pytest
import torch

from starling.features.replicas.notifications import (
    FRAME,
    FRAME_BYTES,
    HEADER,
    FrameAssembler,
    FrameError,
    MessageLimits,
    Messenger,
    frames,
)
from starling.features.replicas.remote_attention_client import RemoteAttentionClient
from starling.features.replicas.remote_attention_server import RemoteAttentionServer
from starling.features.replicas.remote_query import message_limits
from tests.unit.attention_backends.test_rows import HEADS
from tests.unit.replicas.test_remote_attention import CPU_PAGE, CPU_SIZE, LIMITS, cpu_cache, remote_queries

FULL = bytes(FRAME_BYTES)


def one_frame(whole: bytes) -> bytes:
    return FRAME.pack(1, 0, 1) + whole


def message(header: object, body: bytes = b"") -> bytes:
    packed = msgspec.msgpack.encode(header)
    return one_frame(HEADER.pack(len(packed)) + packed + body)


# Frames.

NOT_FRAMES = {
    "empty": b"",
    "shorter than a frame's header": b"short",
    "longer than a frame": one_frame(FULL + b"x"),
    "no frames": FRAME.pack(1, 0, 0),
    "behind the last one": FRAME.pack(1, 3, 3) + b"x",
    "of a message beyond the limit": FRAME.pack(1, 0, 2**32 - 1) + FULL,
    "truncated": FRAME.pack(1, 0, 3) + b"x",
    "without a message's header": one_frame(b"ab"),
    "a header that ends too early": one_frame(HEADER.pack(100) + b"\x81"),
    "a header that is no msgpack": one_frame(HEADER.pack(1) + b"\xc1"),
    "a header that is no map": message([1, 2]),
    "a header with numbers for names": message({1: 2}),
}


@pytest.mark.parametrize("frame", NOT_FRAMES.values(), ids=NOT_FRAMES)
def test_what_is_no_frame_is_refused_and_leaves_nothing(frame):
    assembler = FrameAssembler(LIMITS)
    with pytest.raises(FrameError):
        assembler.add("sender", frame)
    assert not assembler.incomplete
    (good,) = frames(1, {"id": 1}, b"body")
    assert assembler.add("sender", good).body == b"body"


@pytest.mark.parametrize("second", [FRAME.pack(1, 1, 2) + b"x", FRAME.pack(1, 0, 3) + FULL], ids=["count", "twice"])
def test_frames_of_one_message_that_contradict_one_another_are_refused(second):
    assembler = FrameAssembler(LIMITS)
    assembler.add("sender", FRAME.pack(1, 0, 3) + FULL)
    with pytest.raises(FrameError, match="contradict"):
        assembler.add("sender", second)
    assert not assembler.incomplete


def test_incomplete_messages_take_no_more_memory_than_as_many_whole_ones_as_there_are_senders():
    limits = MessageLimits(4 * FRAME_BYTES, num_senders=2)
    assembler = FrameAssembler(limits)
    refused = 0
    for number in range(100):
        try:
            assembler.add(f"sender {number % 5}", FRAME.pack(number, 0, 4) + FULL)
        except FrameError:
            refused += 1
        assert sum(map(len, assembler.incomplete.values())) <= 8
    assert refused == 92


def test_the_limit_is_what_one_step_needs():
    """A step of 8192 tokens of a model with 32 heads of size 128 in bfloat16, and its response."""
    limits = message_limits(8192, 32 * 128 * 2, 32, num_ranges=8192 + 10_000, num_senders=2)
    spans = [("n" * 100, 2**20, 1, [2**20], [2**20], [2**20])] * 8191
    spans += [("n" * 100, 2**20, 1, [2**20] * 10_000, [2**20] * 10_000, [2**20] * 10_000)]
    header = {"id": 2**40, "layer": "model.layers.10.self_attn.attn", "scale": 0.1, "softcap": 0.0, "dtype": "bfloat16"}
    query = header | {"heads": 32, "size": 128, "spans": spans}
    for needed in ((query, bytes(8192 * 32 * 128 * 2)), ({"id": 1}, bytes(8192 * 32 * (128 * 2 + 4)))):
        assert sum(1 for _ in frames(1, *needed)) <= limits.message_frames
    assert limits.message_bytes < 2 * 8192 * 32 * 128 * 2


# A holder and its client, over NIXL.


@pytest.fixture(scope="module")
def holder():
    made = RemoteAttentionServer("malformed-server", {"layer": cpu_cache(8)}, dict, LIMITS)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def stranger(holder):
    """A peer that says hello, and then anything."""
    made = Messenger("malformed-stranger", LIMITS)
    made.connect(holder.messenger.address)
    made.send("malformed-server", {"hello": made.address})
    return made


@pytest.fixture(scope="module")
def client():
    return RemoteAttentionClient("malformed-client", 0, lambda size: None, LIMITS)


GOOD = {
    "id": 7,
    "layer": "layer",
    "scale": 0.3,
    "softcap": 0.0,
    "dtype": "float32",
    "heads": HEADS,
    "size": CPU_SIZE,
    "spans": [("a", 0, 1, [0], [2 * CPU_PAGE], [0])],
}
BODY = bytes(4 * HEADS * CPU_SIZE)

NOT_QUERIES = {
    "no id": ({"header": "without"}, b""),
    "an id that is text": (GOOD | {"id": "seven"}, BODY),
    "no spans": ({name: value for name, value in GOOD.items() if name != "spans"}, BODY),
    "hello without an address": ({"hello": 3}, b""),
    "hello with another's name": ({"hello": {"name": "other", "metadata": b"x"}}, b""),
}
WRONG_QUERIES = {
    "another dtype": (GOOD | {"dtype": "float64"}, BODY),
    "no dtype": (GOOD | {"dtype": "load"}, BODY),
    "no heads": (GOOD | {"heads": 0}, BODY),
    "heads that are no multiple of the KV heads": (GOOD | {"heads": HEADS + 1}, BODY),
    "another head size": (GOOD | {"size": 2 * CPU_SIZE}, 2 * BODY),
    "a truncated body": (GOOD, BODY[:-4]),
    "a body that is too long": (GOOD, BODY + b"abcd"),
    "no query tokens": (GOOD | {"spans": []}, b""),
    "a negative number of query tokens": (GOOD | {"spans": [("a", 0, -1, [0], [CPU_PAGE], [0])]}, BODY),
    "a query token behind the last": (GOOD | {"spans": [("a", 1, 1, [0], [CPU_PAGE], [0])]}, BODY),
    "a query token before the first": (GOOD | {"spans": [("a", -1, 1, [0], [CPU_PAGE], [0])]}, BODY),
    "keys behind the shard": (GOOD | {"spans": [("a", 0, 1, [1], [CPU_PAGE + 1], [0])]}, BODY),
    "keys before the shard": (GOOD | {"spans": [("a", 0, 1, [-1], [CPU_PAGE], [0])]}, BODY),
    "no keys": (GOOD | {"spans": [("a", 0, 1, [0], [0], [0])]}, BODY),
    "no ranges": (GOOD | {"spans": [("a", 0, 1, [], [], [])]}, BODY),
    "a range without a rotation": (GOOD | {"spans": [("a", 0, 1, [0, 1], [1, 1], [0])]}, BODY),
    "a negative rotation": (GOOD | {"spans": [("a", 0, 1, [0], [CPU_PAGE], [-1])]}, BODY),
    "a rotation of a layer that has none": (GOOD | {"spans": [("a", 0, 1, [0], [CPU_PAGE], [1])]}, BODY),
    "another shard": (GOOD | {"spans": [("b", 0, 1, [0], [CPU_PAGE], [0])]}, BODY),
    "another layer": (GOOD | {"layer": "other"}, BODY),
}


def responses(messenger: Messenger, count: int) -> list[dict]:
    """The headers of the next ``count`` messages."""
    found, deadline = [], time.monotonic() + 300
    while len(found) < count:
        found += [message.header for message in messenger.receive()]
        assert time.monotonic() < deadline
    return found


def test_a_holder_goes_on_after_whatever_arrives(holder, stranger, caplog_vllm):
    holder.open("a", [5, 2])
    for frame in NOT_FRAMES.values():
        stranger.agent.send_notif("malformed-server", frame)
    for header, body in [*NOT_QUERIES.values(), *WRONG_QUERIES.values()]:
        stranger.send("malformed-server", header, body)
    stranger.send("malformed-server", GOOD | {"id": 8}, BODY)
    answers = responses(stranger, len(WRONG_QUERIES) + 1)
    assert [(answer["id"], "error" in answer) for answer in answers] == [(7, True)] * len(WRONG_QUERIES) + [(8, False)]
    assert holder.thread.is_alive()
    assert holder.failure is None
    text = caplog_vllm.text
    assert "frames of 'malformed-stranger' are refused" in text
    assert text.count("the header is no query") == 3


def test_a_client_goes_on_after_responses_that_do_not_fit(holder, client, stranger, monkeypatch):
    """An exception in a step would end the engine."""
    (query,) = (remote for remote in remote_queries([holder, holder]) if remote.spans[0].shard == "a")
    attend = holder._attend
    monkeypatch.setattr(holder, "_attend", lambda *arguments: attend(*arguments)[:-4])
    step, out = client.step([query]), torch.zeros(8, HEADS, CPU_SIZE)
    sent = step.begin("layer", torch.randn_like(out), 0.3, 0.0)
    stranger.connect(client.messenger.address)
    others = ({}, {"id": "x"}, {"id": next(iter(sent))}, {"id": [1]}, {"failed": "not yours"})
    for header in others:
        stranger.send("malformed-client", header)
    receive, arrived = client.messenger.receive, []
    deadline = time.monotonic() + 300
    while len(arrived) < len(others) + 1:
        arrived += receive()
        stranger.receive()  # drives its transport
        assert time.monotonic() < deadline
    arrived.sort(key=lambda message: message.sender == "malformed-server")  # the response comes last
    monkeypatch.setattr(client.messenger, "receive", lambda: [arrived.pop(0)])
    step.finish(sent, out, torch.zeros(8, HEADS))
    assert not arrived
    assert "does not fit the query" in client.take_lost().reasons["me"]
    assert step.queries == []


def test_a_holder_whose_thread_ends_hands_out_no_shard_and_tells_its_clients(monkeypatch):
    server = RemoteAttentionServer("dying-server", {"layer": cpu_cache(8)}, dict, LIMITS)
    client = RemoteAttentionClient("dying-client", 0, lambda size: None, LIMITS)
    (query,) = (remote for remote in remote_queries([server, server]) if remote.spans[0].shard == "a")
    step, out = client.step([query]), torch.zeros(8, HEADS, CPU_SIZE)
    step.finish(step.begin("layer", torch.randn_like(out), 0.3, 0.0), out, torch.zeros(8, HEADS))
    assert client.take_lost() is None
    receives, sends = threading.Event(), threading.Event()

    def fail():
        receives.set()
        sends.wait()
        raise RuntimeError("the transport is gone")

    monkeypatch.setattr(server.messenger, "receive", fail)
    assert receives.wait(300), "else the thread may still receive the query below"
    sent = step.begin("layer", torch.randn_like(out), 0.3, 0.0)
    sends.set()
    server.thread.join(300)
    step.finish(sent, out, torch.zeros(8, HEADS))
    assert "the transport is gone" in client.take_lost().reasons["me"]
    assert not server.shards
    with pytest.raises(RuntimeError, match=r"can't hold KV for other ones any more.*transport is gone"):
        server.open("b", [1])
    server.stop()


@pytest.fixture
def caplog_vllm(caplog, monkeypatch):
    """vLLM's loggers do not propagate."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.ERROR, logger="vllm.starling")
    return caplog
