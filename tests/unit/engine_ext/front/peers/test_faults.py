"""Peers that die, hang, or send what they should not, while they have a part of a prompt."""

from __future__ import annotations

import asyncio

import grpc
import msgspec
import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from starling.engine_ext.serving.grpc import replica_service
from starling.features.replicas.replica_calls import CANCEL_FETCH, RELEASE
from starling.features.replicas.split import peer_replica, peers
from starling.features.replicas.split.engine_replica import SplitPrompt
from starling.features.replicas.split.peers import Identity
from starling.features.replicas.split.replica_rpc import ReplicaTimeout
from starling.scheduler.star.plan import StarPlan
from starling.v1 import replica_pb2 as pb
from tests.unit.engine_ext.front.peers.pods import (
    ADDRESS,
    AUTO,
    TIMEOUT,
    Pod,
    held_by,
    session_of,
    stop_before_the_whole_request,
    until,
)
from tests.unit.engine_ext.front.simulation import PAGE_SIZE, TOKENS, sent
from tests.unit.scheduler.simulation import random_ids


def test_a_peer_that_dies_while_it_prefills_leaves_the_prompt_to_this_server(run_pods):
    async def scenario(a, b):
        prompt = random_ids(3, 2000)
        running = asyncio.create_task(a.server.generate(prompt, AUTO))
        await until(lambda: b.replica.work)
        await b.front.server.stop(None)
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert max(stop for _, stop in a.replica.work.values()) == 2002
        await a.state.peers.refresh()
        assert a.state.peers.usable == []

    run_pods(scenario)


def test_a_peer_whose_engine_hangs_leaves_the_prompt_to_this_server(run_pods):
    async def scenario(a, b):
        running = asyncio.create_task(a.server.generate(random_ids(3, 2000), AUTO))
        await until(lambda: b.replica.work)
        b.state.rpc.timeout = 0.2
        b.replica.running.clear()
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        b.state.rpc.timeout = TIMEOUT
        b.replica.running.set()

    run_pods(scenario)


@pytest.mark.parametrize("moment", ["before the prompt", "during its part"])
def test_a_peer_that_is_paused_is_not_waited_for(run_pods, moment):
    """Its operator may be loading weights: `/pause` lasts until `/resume`."""

    async def scenario(a, b):
        if moment == "during its part":
            running = asyncio.create_task(a.server.generate(random_ids(3, 2000), AUTO))
            await until(lambda: b.replica.work)
            b.replica.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        else:
            b.replica.scheduler.set_pause_state(PauseState.PAUSED_NEW)
            running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.replica.fetched == [] and a.state.peers.usable == []
        await until(lambda: not b.replica.scheduler.requests)
        b.replica.scheduler.set_pause_state(PauseState.UNPAUSED)
        await a.state.peers.refresh()

    run_pods(scenario)


@pytest.mark.parametrize("moment", ["during its part", "before the fetch"])
def test_a_peer_does_not_hold_pages_for_a_server_that_is_paused(run_pods, moment):
    """The prompt is computed where it was asked for, once that server's operator resumes it."""

    async def scenario(a, b):
        stop_before_the_whole_request(a)
        running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        if moment == "during its part":
            await until(lambda: a.replica.work)
            a.replica.running.clear()
        else:
            await until(lambda: a.replica.work and not a.replica.running.is_set())
        await held_by(b)
        a.replica.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        a.replica.running.set()
        await until(lambda: not b.replica.held and not b.state.leases)
        await until(lambda: not a.state.reservations.reserved.total())
        assert not running.done()
        a.replica.scheduler.set_pause_state(PauseState.UNPAUSED)
        a.replica.woken.set()
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.replica.fetched == []

    run_pods(scenario)


def test_a_peer_that_hangs_before_the_parts_is_not_waited_for(run_pods, monkeypatch):
    monkeypatch.setattr(peer_replica, "STATE_SECONDS", 0.2)

    async def scenario(a, b):
        b.replica.running.clear()
        await a.server.generate(TOKENS, AUTO)
        assert a.server.work() == [[(0, 522)]]
        b.replica.running.set()

    run_pods(scenario)


def test_pages_stay_held_when_the_call_breaks_until_the_other_server_must_have_noticed(run_pods, monkeypatch):
    noticed, waited = asyncio.Event(), []

    async def until_noticed(seconds):
        waited.append(seconds)
        await noticed.wait()

    async def scenario(a, b):
        a.replica.loads_arrive = False
        running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        await until(lambda: a.replica.fetched)
        session = session_of(a)
        await b.front.server.stop(None)  # all of its calls break
        await until(lambda: session.has_lost_pages)
        outputs = await running  # what was not fetched is computed here
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.server.calls(CANCEL_FETCH)
        assert max(stop for _, stop in a.replica.work.values()) == 522
        assert b.replica.held
        noticed.set()
        await until(lambda: not b.replica.held)
        assert waited == [2 * TIMEOUT + peers.NOTICE_SECONDS]

    monkeypatch.setattr(replica_service, "until_noticed", until_noticed)
    run_pods(scenario)


async def held_for(pod: Pod, prompt: pb.Prompt) -> grpc.aio.Call:
    """A call to a pod which holds pages of the prompt."""
    call = pod.state.peers.usable[0].prefill_part()
    await call.write(pb.PrefillPartRequest(prompt=prompt))
    await call.read()
    await call.write(pb.PrefillPartRequest(part=pb.Part(first_block=0, stop_block=2)))
    while (await call.read()).WhichOneof("step") != "held":
        pass
    return call


PROMPT = pb.Prompt(request_id="x", token_ids=TOKENS, block_size=64, anchor_size=64, context_end=500)


def test_a_call_that_ends_without_a_release_counts_as_broken(run_pods, monkeypatch):
    """gRPC may show a call that broke as one whose caller has sent all of its messages."""
    noticed = asyncio.Event()

    async def until_noticed(seconds):
        await noticed.wait()

    async def scenario(a, b):
        call = await held_for(a, PROMPT)
        await call.done_writing()
        await until(lambda: b.state.releases)
        await b.state.rpc.call(b.server.engine, 0, RELEASE, [])
        assert b.replica.held
        noticed.set()
        assert await call.read() is grpc.aio.EOF
        assert not b.replica.held

    monkeypatch.setattr(replica_service, "until_noticed", until_noticed)
    run_pods(scenario)


def test_a_message_that_is_no_release_releases_nothing(run_pods):
    async def scenario(a, b):
        call = await held_for(a, PROMPT)
        await call.write(pb.PrefillPartRequest(part=pb.Part(first_block=0, stop_block=1)))
        await call.write(pb.PrefillPartRequest())
        for _ in range(3):
            await a.state.peers.usable[0].describe()
            await b.state.rpc.call(b.server.engine, 0, RELEASE, [])
        assert b.replica.held
        await call.write(pb.PrefillPartRequest(release=pb.Release()))
        assert await call.read() is grpc.aio.EOF
        assert not b.replica.held

    run_pods(scenario)


def test_an_engine_that_hangs_while_a_peer_is_lost_fetches_nothing_when_it_is_back(run_pods, monkeypatch):
    async def at_once(seconds):
        pass

    async def scenario(a, b):
        a.replica.loads_arrive = False
        running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        await until(lambda: a.replica.fetched)
        session = session_of(a)
        a.replica.running.clear()
        a.state.rpc.timeout = 0.2
        with pytest.raises(ReplicaTimeout):  # from now on it counts as unresponsive
            await a.state.rpc.call(a.server.engine, 0, RELEASE, [])
        await b.front.server.stop(None)
        await until(lambda: session.has_lost_pages)
        await until(lambda: a.server.calls(CANCEL_FETCH))
        a.state.rpc.timeout = TIMEOUT
        a.replica.running.set()
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]

    monkeypatch.setattr(replica_service, "until_noticed", at_once)
    run_pods(scenario)


def test_a_prompt_waits_for_this_servers_engine_which_hangs_while_parts_run(run_pods):
    async def scenario(a, b):
        running = asyncio.create_task(a.server.generate(random_ids(3, 1000), AUTO))
        await until(lambda: a.replica.work and b.replica.work)
        a.state.rpc.timeout = 0.2
        a.replica.running.clear()
        await until(lambda: a.state.rpc.is_unresponsive(0))
        await until(lambda: not b.replica.scheduler.requests)
        a.state.rpc.timeout = TIMEOUT
        a.replica.running.set()
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]

    run_pods(scenario)


def test_a_peer_that_does_not_answer_does_not_spoil_the_parts_of_others(run_pods, monkeypatch):
    exchange = peer_replica.PeerReplica._exchange

    async def scenario(a, b, c):
        async def shorter_with_b(self, request, seconds):
            return await exchange(self, request, 0.2 if self.peer.address == b.address else seconds)

        monkeypatch.setattr(peer_replica.PeerReplica, "_exchange", shorter_with_b)
        b.replica.running.clear()
        await a.server.generate(TOKENS, AUTO)
        assert len(c.replica.work) == 2
        assert a.replica.fetched
        assert not a.server.calls(CANCEL_FETCH)
        b.replica.running.set()

    run_pods(scenario, 3)


def test_a_peer_has_the_time_limit_beside_the_time_between_its_messages(run_pods, monkeypatch):
    exchange, limits = peer_replica.PeerReplica._exchange, []

    async def noting(self, request, seconds):
        limits.append(seconds)
        return await exchange(self, request, seconds)

    async def scenario(a, b):
        await a.server.generate(TOKENS, AUTO)
        of_state, *others = limits
        assert of_state == peer_replica.STATE_SECONDS
        assert others
        assert min(others) > TIMEOUT + peer_replica.HEALTH_CHECK_SECONDS

    monkeypatch.setattr(peer_replica.PeerReplica, "_exchange", noting)
    run_pods(scenario)


def test_a_call_that_was_cancelled_is_released_without_an_error(run_pods):
    async def scenario(a, b):
        plan = StarPlan(64, 64, 0, 500, len(TOKENS), replicas=2)
        session = peer_replica.PeerReplica(a.state.peers.usable[0], SplitPrompt("x", TOKENS, plan, PAGE_SIZE), 30)
        await session.state()
        session._call.cancel()
        await session.release()

    run_pods(scenario)


def test_pages_that_are_lost_before_the_request_begins_are_not_fetched(run_pods, monkeypatch):
    async def at_once(seconds):
        pass

    async def scenario(a, b):
        running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        await until(lambda: a.replica.work)
        a.replica.running.clear()  # its own part ends later
        await held_by(b)
        session = session_of(a)
        await until(lambda: session._ending is not None)  # it knows that the part is held
        await b.front.server.stop(None)
        await until(lambda: session.has_lost_pages)
        a.replica.running.set()
        await running
        assert a.replica.fetched == []
        assert max(stop for _, stop in a.replica.work.values()) == 522

    monkeypatch.setattr(replica_service, "until_noticed", at_once)
    run_pods(scenario)


@pytest.mark.parametrize(
    "change",
    [
        {"start": 0},
        {"page_ids": [1]},
        {"page_ids": []},
        {"addresses": b"\xc1"},
        {"addresses": b"\x91\x81\xa1a\x01"},
        {"addresses": b"\x90"},
        {"addresses": msgspec.msgpack.encode([ADDRESS | {"layout": None}])},
        {"addresses": msgspec.msgpack.encode([ADDRESS | {"bases": "0"}])},
    ],
    ids=str,
)
def test_a_peer_that_holds_other_pages_than_it_should_is_left_out(run_pods, monkeypatch, change):
    response_of = replica_service.response_of

    def other_response(part):
        response = response_of(part)
        for name, value in change.items():
            response.held.ClearField(name)
            response.held.MergeFrom(pb.HeldPart(**{name: value}))
        return response

    async def scenario(a, b):
        outputs = await a.server.generate(TOKENS, AUTO)
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.replica.fetched == []

    monkeypatch.setattr(replica_service, "response_of", other_response)
    run_pods(scenario)


def test_a_server_that_took_a_peers_place_after_the_comparison_gives_no_pages(run_pods):
    """As behind an address that leads to one server after the other: what was compared is not what answers."""

    async def scenario(a, b):
        b.replica.set_layout({"dtype": "float32"})
        b.replica.scheduler.connector.addresses[0]["name"] = "the server after b"
        outputs = await a.server.generate(TOKENS, AUTO)
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.replica.fetched == [] and a.state.peers.usable == []

    run_pods(scenario)


def test_an_identity_is_not_used_before_it_is_compared(run_pods, monkeypatch):
    """One peer's answer to Describe may come seconds before that of another."""

    async def scenario(a, b, c):
        first, second = a.state.peers.usable
        before, answer = first.identity, asyncio.Event()

        async def another() -> Identity:
            return Identity("the server after it", before.properties | {"weights": "others"})

        async def slow() -> Identity:
            await answer.wait()
            return second.identity

        monkeypatch.setattr(first, "describe", another)
        monkeypatch.setattr(second, "describe", slow)
        refreshing = asyncio.create_task(a.state.peers.refresh())
        await asyncio.sleep(0.05)
        assert first.identity is before and first in a.state.peers.usable
        answer.set()
        await refreshing
        assert first.identity.name == "the server after it" and a.state.peers.usable == [second]

    run_pods(scenario, 3)


@pytest.mark.parametrize("addresses", [1, 3])
def test_a_peer_that_names_other_ranks_than_it_has_gives_no_pages(run_pods, addresses):
    async def scenario(a, b):
        (peer,) = a.state.peers.usable
        peer.identity.properties["tensor_parallel"] = "2"
        addresses_of_b = b.replica.scheduler.connector.addresses
        addresses_of_b += [addresses_of_b[0]] * (addresses - 1)
        outputs = await a.server.generate(TOKENS, AUTO)
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.replica.fetched == []

    run_pods(scenario)


@pytest.mark.parametrize("cached", [bytes(100), b"\x02"])
def test_a_peer_whose_state_is_not_that_of_the_prompt_is_left_out(run_pods, monkeypatch, cached):
    prompt_state = replica_service.prompt_state
    monkeypatch.setattr(replica_service, "prompt_state", lambda state: prompt_state(state | {"cached": cached}))

    async def scenario(a, b):
        outputs = await a.server.generate(TOKENS, AUTO)
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.replica.fetched == [] and a.state.peers.usable == []

    run_pods(scenario)


def test_a_peer_whose_engine_ends_all_requests_leaves_the_prompt_to_this_server(run_pods):
    """As vLLM's engine core does once it gets a signal: no client has aborted the request."""

    async def scenario(a, b):
        running = asyncio.create_task(a.server.generate(random_ids(3, 2000), AUTO))
        await until(lambda: b.replica.scheduler.requests)
        names = list(b.replica.scheduler.requests)
        b.replica.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
        for name in names:
            ended = EngineCoreOutput(request_id=name, new_token_ids=[], finish_reason=FinishReason.ABORT)
            b.replica.outputs.put_nowait(sent(EngineCoreOutputs(outputs=[ended]), EngineCoreOutputs))
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.replica.fetched == []

    run_pods(scenario)
