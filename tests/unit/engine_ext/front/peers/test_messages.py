"""Messages to a peer that no server of this version sends."""

from __future__ import annotations

import grpc
import pytest

from starling.engine_ext.serving.grpc.server import Front
from starling.features.replicas.split import peers
from starling.v1 import replica_pb2 as pb
from tests.unit.engine_ext.front.simulation import PAGE_SIZE, TOKENS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": []}, "plan that does not fit"),
        ({"block_size": 0}, "plan that does not fit"),
        ({"block_size": PAGE_SIZE + 1}, "plan that does not fit"),
        ({"anchor_size": 128}, "plan that does not fit"),
        ({"context_end": 0}, "plan that does not fit"),
        ({"context_end": 520}, "plan that does not fit"),
        ({"token_ids": [10**6] * 520}, "vocabulary"),
        ({"adapter": "0123"}, "the adapter 0123, which is not this server's"),
        ({"blocks": [(0, 500)]}, "plan that does not fit"),
        ({"blocks": [(0, 64), (96, 160)], "context_end": 160}, "plan that does not fit"),
        ({"blocks": [(0, 64), (65, 100)], "context_end": 128}, "plan that does not fit"),
        ({"blocks": [(0, 64), (64, 96), (64, 96)], "context_end": 128}, "plan that does not fit"),
        ({"blocks": [(0, 64), (96, 64)], "context_end": 96}, "plan that does not fit"),
        ({"blocks": [(0, 64), (64, 64)], "context_end": 64}, "plan that does not fit"),
        ({"blocks": [(0, 64), (64, 160)], "context_end": 160}, "plan that does not fit"),
        ({"blocks": [(0, 32), (32, 64)], "context_end": 64}, "plan that does not fit"),
        ({"blocks": [(0, 64), (64, 100)], "context_end": 100}, "plan that does not fit"),
    ],
    ids=str,
)
def test_a_prompt_that_can_not_be_served_is_refused(run_pods, change, reason):
    values = {"request_id": "x", "token_ids": TOKENS, "block_size": 64, "anchor_size": 64, "context_end": 500}

    async def scenario(a, b):
        call = a.state.peers.usable[0].prefill_part()
        blocks = [{"start": start, "stop": stop} for start, stop in change.get("blocks", [])]
        await call.write(pb.PrefillPartRequest(prompt=pb.Prompt(**values | change | {"blocks": blocks})))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
            await call.write(pb.PrefillPartRequest(part=pb.Part(first_block=0, stop_block=2)))
            while await call.read() is not grpc.aio.EOF:
                pass
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason in refused.value.details()

    run_pods(scenario)


@pytest.mark.parametrize(("first", "stop"), [(0, 0), (3, 2), (0, 9), (8, 9)])
def test_a_part_that_the_prompt_does_not_have_is_refused(run_pods, first, stop):
    async def scenario(a, b):
        call = a.state.peers.usable[0].prefill_part()
        prompt = pb.Prompt(request_id="x", token_ids=TOKENS, block_size=64, anchor_size=64, context_end=500)
        await call.write(pb.PrefillPartRequest(prompt=prompt))
        await call.read()
        await call.write(pb.PrefillPartRequest(part=pb.Part(first_block=first, stop_block=stop)))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"blocks {first} to {stop} are no part of 8 blocks" in refused.value.details()

    run_pods(scenario)


def test_a_call_without_a_prompt_is_refused(run_pods):
    async def scenario(a, b):
        for messages in ([], [pb.PrefillPartRequest(part=pb.Part())]):
            call = a.state.peers.usable[0].prefill_part()
            for message in messages:
                await call.write(message)
            await call.done_writing()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run_pods(scenario)


def test_a_server_without_peers_has_no_such_service(run_pods):
    async def scenario(a, b):
        front = Front(b.server.engine, ["api key"])
        port = await front.start("127.0.0.1:0", None)
        found = await a.find(f"127.0.0.1:{port}", key="api key")
        (peer,) = found.by_address.values()
        assert peer.problem.startswith("UNIMPLEMENTED")
        await front.stop(0)

    run_pods(scenario)


def test_the_longest_time_without_a_peers_answer_is_below_the_time_that_pages_stay_held():
    """A peer that holds pages gives them away later than the server that reads them has noticed the broken call."""
    options = dict(peers.CHANNEL_OPTIONS)
    notices = (options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"]) / 1000
    assert notices == peers.NOTICE_SECONDS
