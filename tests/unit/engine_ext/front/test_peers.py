"""Prompts split over servers that are peers: real gRPC between real fronts, over simulated engines.

The simulation's fingerprints check every KV page that is read: a wrong page, or one that is no longer held, fails the
step that reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
from argparse import Namespace
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import grpc
import msgspec
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from benchmarks.random_llama import make_random_llama
from engine_ext import plugin
from engine_ext.front import engine_replica, peer_replica, peers
from engine_ext.front.engine_replica import SplitPrompt
from engine_ext.front.peers import Identity, Peers, own_identity
from engine_ext.front.replica_rpc import ReplicaTimeout
from engine_ext.front.state import front_state
from engine_ext.serving.grpc import replica as replica_service
from engine_ext.serving.grpc.admin import AdminServicer
from engine_ext.serving.grpc.auth import peer_credentials, server_credentials
from engine_ext.serving.grpc.replica import ReplicaServicer
from engine_ext.serving.grpc.server import Front
from replicas.core_rpc import CANCEL_FETCH, RELEASE
from replicas.options import ReplicaOptions
from scheduler.star.plan import StarPlan
from scheduler.star.request_metadata import metadata_of
from starling.v1 import replica_pb2 as pb
from tests.parity.harness import TINY
from tests.unit.engine_ext.front.simulation import (
    PAGE_SIZE,
    STAR,
    TOKENS,
    Cluster,
    Server,
    sent,
    serving,
    whole_requests,
)
from tests.unit.scheduler.simulation import HASH, random_ids

KEY = "the key of the peers"
TIMEOUT = 30
ADDRESS = {"name": "x", "metadata": b"", "bases": [], "device": 0, "layout": {"dtype": "float32"}}
AUTO = {name: value for name, value in STAR.items() if name != "star_replicas"}


class Pod:
    """One server with its gRPC front, as `starling serve` makes them."""

    def __init__(self, server: Server, front: Front, address: str) -> None:
        self.server, self.front, self.address = server, front, address
        self.state = front_state(server.engine)

    @property
    def replica(self):
        return self.server.replicas[0]

    async def find(self, entries: str, key: str = KEY, credentials=None) -> Peers:
        """Look for peers once, and use them."""
        options = ReplicaOptions(peers=entries, timeout=TIMEOUT)
        found = Peers(options, await own_identity(self.server.engine, self.state.replica_rpc), key, credentials)
        await found.refresh()
        self.state.set_peers(found)
        return found


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    plugin.register()
    init_none_hash(HASH)
    model = make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY | {"max_position_embeddings": 8192})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        return AsyncEngineArgs(
            model=str(model),
            dtype="float32",
            block_size=PAGE_SIZE,
            max_num_batched_tokens=100,
            max_num_seqs=4,
            enforce_eager=True,
            additional_config={"starling": {"replicas": {"peers": "localhost:1", "timeout": TIMEOUT}}},
        ).create_engine_config()


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(engine_replica, "HEALTH_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(replica_service, "HEALTH_CHECK_SECONDS", 0.1)


@pytest.fixture
def run_pods(config):
    """Run a scenario on servers that are peers of one another; at its end every page has to be free."""

    def run(scenario: Callable[..., Awaitable[object]], number: int = 2) -> None:
        async def bounded() -> None:
            cluster, pods = Cluster(number, 100), []
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(number):
                    server = await stack.enter_async_context(serving(config, cluster=cluster))
                    identity = await own_identity(server.engine, front_state(server.engine).replica_rpc)
                    front = Front(
                        server.engine, ["api key"], replica=ReplicaServicer(server.engine, identity), replica_key=KEY
                    )
                    port = await front.start("127.0.0.1:0", None)
                    stack.push_async_callback(front.stop, 0)
                    pods.append(Pod(server, front, f"127.0.0.1:{port}"))
                for pod in pods:
                    await pod.find(",".join(other.address for other in pods))
                await scenario(*pods)
                for pod in pods:
                    await until(lambda pod=pod: not pod.state.releases and not pod.state.split_requests)
                    await until(lambda pod=pod: not pod.replica.scheduler.has_requests())
                    pod.server.check_all_is_free()
                    assert not pod.state.internal_ids
                    assert not pod.server.engine.output_processor.request_states
                    assert pod.server.engine.get_num_unfinished_requests() == 0

        asyncio.run(asyncio.wait_for(bounded(), 60))

    return run


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def held_by(pod: Pod) -> None:
    """Wait until a pod holds pages for another one."""
    await until(lambda: pod.replica.held)


# Prompts that are split.


def test_a_peer_prefills_a_part_and_the_pages_are_fetched(run_pods):
    async def scenario(a, b):
        outputs = await a.server.generate(TOKENS, AUTO, priority=7, cache_salt="salt")
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.server.work() == [[(0, 320), (480, 522)]]
        assert b.server.work() == [[(0, 64), (320, 480)]]
        (whole,) = whole_requests(a.server)
        assert [source.start for source in metadata_of(whole).fetch.sources] == [320]
        assert a.replica.fetched == [160 // PAGE_SIZE]
        requests = [*a.replica.requests.values(), *b.replica.requests.values()]
        assert {(request.priority, request.cache_salt) for request in requests} == {(7, "salt")}

    run_pods(scenario)


def test_three_servers_share_a_prompt_and_each_may_be_asked(run_pods):
    async def scenario(*pods):
        for seed, pod in enumerate(pods):
            before = [len(other.replica.work) for other in pods]
            await pod.server.generate(random_ids(seed, 900), AUTO)
            assert [len(other.replica.work) - count for other, count in zip(pods, before, strict=True)] == [2, 2, 2]

    run_pods(scenario, 3)


def test_what_a_peer_has_cached_is_not_computed_again(run_pods):
    async def scenario(a, b):
        await b.server.generate(TOKENS, AUTO | {"star_replicas": 1})
        before = len(b.replica.work)
        await a.server.generate(TOKENS, AUTO)
        (whole,) = whole_requests(a.server)
        assert (
            sum(stop - start for start, stop in list(b.replica.work.values())[before:]) <= PAGE_SIZE
        )  # a part's last page, for its one output
        assert metadata_of(whole).fetch is not None

    run_pods(scenario)


def test_the_plan_names_the_servers_there_are_now(run_pods):
    async def scenario(a, b):
        planner = a.state.planner
        assert planner.plan(AUTO, 900, random_ids(0, 900)).plan.replicas == 2
        a.state.peers.peers[b.address].problem = "gone"
        assert planner.plan(AUTO, 900, random_ids(0, 900)).plan.replicas == 1
        assert planner.plan(AUTO | {"star_replicas": 5}, 900, random_ids(0, 900)).plan.replicas == 1

    run_pods(scenario)


def test_a_prompt_is_made_a_message_once_for_all_peers(run_pods, monkeypatch):
    made = []

    def make(**fields):
        made.append(fields)
        return pb.PrefillPartRequest(**fields)

    async def scenario(a, b, c):
        await a.server.generate(TOKENS, AUTO)
        assert len(made) == 1
        assert b.replica.work
        assert c.replica.work

    monkeypatch.setattr(engine_replica, "pb", Namespace(PrefillPartRequest=make))
    run_pods(scenario, 3)


def test_any_priority_is_sent(run_pods):
    async def scenario(a, b):
        for priority in (2**40, -(2**40)):
            await a.server.generate(random_ids(priority % 1000, 520), AUTO, priority=priority)
            assert {request.priority for request in b.replica.requests.values()} == {priority}
            b.replica.requests.clear()

    run_pods(scenario)


@pytest.mark.parametrize("token", [10**6, 2**32])
def test_a_prompt_with_an_unknown_token_is_refused_as_without_peers(run_pods, token):
    async def scenario(a, b):
        for star in (AUTO, AUTO | {"star_replicas": 1}):
            with pytest.raises(VLLMValidationError, match="vocabulary"):
                await a.server.generate([*TOKENS, token], star)
        assert a.state.peers.usable

    run_pods(scenario)


@pytest.mark.parametrize("asked", [(0, 0, 0, 0), (0, 1, 0, 1)], ids=["one server", "both servers"])
def test_prompts_that_do_not_fit_at_once_do_not_wait_for_one_another(run_pods, asked):
    """Each takes half of a server's memory, and holds its own part while the others' parts run."""

    async def scenario(*pods):
        runs = (pods[at].server.generate(random_ids(n, 1500), AUTO, name=f"{n}") for n, at in enumerate(asked))
        for outputs in await asyncio.gather(*runs):
            assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        for pod in pods:
            assert not any(pod.state.reservations.reserved.values())

    run_pods(scenario)


def test_a_peer_without_memory_for_a_part_refuses_it(run_pods):
    async def scenario(a, b):
        reserved = b.state.reservations.reserve_at_once({0: 95}, {0: 99})
        await a.server.generate(TOKENS, AUTO)
        assert b.server.work() == [[]]
        assert max(stop for _, stop in a.replica.work.values()) == 522
        assert b.state.reservations.reserved[0] == 95
        reserved.release(0)

    run_pods(scenario)


# Requests that end early.


@pytest.mark.parametrize("moment", ["the parts run", "one part is held"])
def test_a_client_that_leaves_takes_the_parts_with_it(run_pods, moment):
    async def scenario(a, b):
        held = moment == "one part is held"
        running = asyncio.create_task(a.server.generate(TOKENS if held else random_ids(1, 4000), AUTO))
        await until(lambda: a.replica.work and b.replica.work)
        if held:
            a.replica.running.clear()  # its own part does not end
            await held_by(b)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        a.replica.running.set()
        await until(lambda: not b.replica.held and not b.replica.scheduler.requests)

    run_pods(scenario)


def test_a_request_that_an_operator_aborts_on_either_server_ends(run_pods):
    async def scenario(a, b):
        for pod in (a, b):
            running = asyncio.create_task(a.server.generate(random_ids(3, 4000), AUTO))
            await until(lambda: a.state.internal_ids and b.state.internal_ids)
            await pod.server.engine.abort("me")
            (output,) = await running
            assert [choice.finish_reason for choice in output.outputs] == ["abort"]

    run_pods(scenario)


def test_an_operator_aborts_another_servers_part_by_the_engines_id(run_pods):
    async def scenario(a, b):
        running = asyncio.create_task(a.server.generate(random_ids(3, 4000), AUTO))
        await until(lambda: a.state.internal_ids and b.state.internal_ids)
        (part,) = b.state.internal_ids
        response = await AdminServicer(b.server.engine, b.front, max_message_bytes=1)._abort([part])
        assert response.found == [part]
        (output,) = await running
        assert output.outputs[0].finish_reason == "abort"
        assert len(a.state.peers.usable) == 1

    run_pods(scenario)


def test_draining_waits_for_the_parts_of_other_servers(run_pods):
    async def scenario(a, b):
        running = asyncio.create_task(a.server.generate(random_ids(3, 2000), AUTO))
        await until(lambda: b.state.internal_ids)
        assert b.server.engine.get_num_unfinished_requests() == 1
        await b.front.stop_admitting()
        stopping = asyncio.create_task(b.front.stop(30))
        await asyncio.sleep(0)
        await running
        assert len(b.replica.work) == 2
        await stopping
        # From now on this server computes alone.
        await a.state.peers.refresh()
        assert a.state.peers.usable == []
        await a.server.generate(random_ids(4, 600), AUTO)
        assert len(b.replica.work) == 2

    run_pods(scenario)


# Faults.


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
        b.state.replica_rpc.timeout = 0.2
        b.replica.running.clear()
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        b.replica.running.set()

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
        (session,) = a.state.split_requests._requests[0].peers
        await b.front.server.stop(None)  # all of its calls break
        await until(lambda: session.has_failed)
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
        await b.state.replica_rpc.call(b.server.engine, 0, RELEASE, [])
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
            await b.state.replica_rpc.call(b.server.engine, 0, RELEASE, [])
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
        (session,) = a.state.split_requests._requests[0].peers
        a.replica.running.clear()
        a.state.replica_rpc.timeout = 0.2
        with pytest.raises(ReplicaTimeout):  # from now on it counts as unresponsive
            await a.state.replica_rpc.call(a.server.engine, 0, RELEASE, [])
        await b.front.server.stop(None)
        await until(lambda: session.has_failed)
        await until(lambda: a.server.calls(CANCEL_FETCH))
        a.replica.running.set()
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]

    monkeypatch.setattr(replica_service, "until_noticed", at_once)
    run_pods(scenario)


def test_a_prompt_waits_for_this_servers_engine_which_hangs_while_parts_run(run_pods):
    async def scenario(a, b):
        running = asyncio.create_task(a.server.generate(random_ids(3, 1000), AUTO))
        await until(lambda: a.replica.work and b.replica.work)
        a.state.replica_rpc.timeout = 0.2
        a.replica.running.clear()
        await until(lambda: a.state.replica_rpc.is_unresponsive(0))
        await until(lambda: not b.replica.scheduler.requests)
        a.replica.running.set()
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]

    run_pods(scenario)


def test_a_peer_that_does_not_answer_does_not_spoil_the_parts_of_others(run_pods, monkeypatch):
    monkeypatch.setattr(peer_replica, "STATE_SECONDS", 1)

    async def scenario(a, b, c):
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
        await until(lambda: a.replica.work and b.replica.work)
        a.replica.running.clear()  # its own part ends later
        await held_by(b)
        (session,) = a.state.split_requests._requests[0].peers
        await until(lambda: session._ending is not None)  # it knows that the part is held
        await b.front.server.stop(None)
        await until(lambda: session.has_failed)
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


# Who is a peer.


def test_a_server_is_not_its_own_peer_and_counts_once(run_pods):
    async def scenario(a, b):
        port = b.address.rpartition(":")[2]
        found = await a.find(f"{a.address},{b.address},localhost:{port}")
        assert len(found.usable) == 1
        problems = [peer.problem for peer in found.peers.values() if peer.problem]
        assert "it is this server" in problems

    run_pods(scenario)


def test_only_servers_with_the_same_model_weights_and_versions_are_used(run_pods):
    async def scenario(a, b):
        own = await own_identity(a.server.engine, a.state.replica_rpc)
        assert set(own.properties) >= {"starling", "vllm", "model", "weights", "dtype", "timeout"}
        b.replica.weights = "others"
        theirs = await own_identity(b.server.engine, b.state.replica_rpc)
        assert "weights" in own.mismatch(theirs)
        service = ReplicaServicer(b.server.engine, theirs)
        front = Front(b.server.engine, [], replica=service, replica_key=KEY)
        port = await front.start("127.0.0.1:0", None)
        found = await a.find(f"127.0.0.1:{port}")
        assert found.usable == []
        (peer,) = found.peers.values()
        assert peer.problem.startswith("its KV pages can't be used here: weights '")
        await front.stop(0)

    run_pods(scenario)


@pytest.mark.parametrize("key", ["another key", "api key", ""])
def test_a_server_with_another_key_gets_nothing(run_pods, key):
    async def scenario(a, b):
        found = await a.find(b.address, key=key)
        (peer,) = found.peers.values()
        assert peer.problem.startswith("UNAUTHENTICATED")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await peer.prefill_part().read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await a.server.generate(TOKENS, AUTO)
        assert b.server.work() == [[]]

    run_pods(scenario)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_the_certificate_of_a_peer_has_to_be_for_the_name_by_which_it_is_found(run_pods, certificates, name):
    """The certificate is for localhost alone."""
    certificate, key = map(str, certificates)
    args = Namespace(ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=None, ssl_cert_reqs=0)
    args.enable_ssl_refresh = False

    async def scenario(a, b):
        identity = await own_identity(b.server.engine, b.state.replica_rpc)
        front = Front(b.server.engine, [], replica=ReplicaServicer(b.server.engine, identity), replica_key=KEY)
        port = await front.start("127.0.0.1:0", server_credentials(args))
        found = await a.find(f"{name}:{port}", credentials=peer_credentials(args))
        # Some systems have IPv6 for localhost too, where nothing listens.
        assert [peer.address for peer in found.usable] == ([f"127.0.0.1:{port}"] if name == "localhost" else [])
        plain = await a.find(f"localhost:{port}")
        assert plain.usable == []
        if name == "localhost":
            a.state.set_peers(found)
            await a.server.generate(TOKENS, AUTO)
            assert b.server.work() == [[(0, 64), (320, 480)]]
        await front.stop(0)

    run_pods(scenario)


def test_a_name_that_can_not_be_looked_up_keeps_its_last_addresses(run_pods, monkeypatch):
    async def scenario(a, b):
        found = await a.find(b.address)

        async def fail(*args, **kwargs):
            raise OSError("no name server")

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", fail)
        await found.refresh()
        assert [peer.address for peer in found.usable] == [b.address]

    run_pods(scenario)


def test_a_look_up_that_hangs_does_not_keep_a_server_from_starting(run_pods, monkeypatch):
    monkeypatch.setattr(peers, "RESOLVE_SECONDS", 0.1)

    async def scenario(a, b):
        async def hang(*args, **kwargs):
            await asyncio.Event().wait()

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", hang)
        found = await asyncio.wait_for(a.find(b.address), 10)
        assert found.usable == []

    run_pods(scenario)


def test_all_addresses_behind_a_name_are_peers_and_those_that_leave_are_forgotten(run_pods, monkeypatch):
    async def scenario(a, b):
        port = int(b.address.rpartition(":")[2])
        behind = ["127.0.0.1", "::1"]

        async def look_up(host, port, **_):
            assert host == "starling-peers"
            return [(0, 0, 0, "", (address, port)) for address in behind]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
        found = await a.find(f"starling-peers:{port}")
        assert sorted(found.peers) == [f"127.0.0.1:{port}", f"[::1]:{port}"]
        assert [peer.address for peer in found.usable] == [b.address]
        behind.remove("127.0.0.1")
        await found.refresh()
        assert list(found.peers) == [f"[::1]:{port}"]
        assert found.usable == []

    run_pods(scenario)


def test_servers_of_a_longrope_model_need_the_same_longest_prompt(run_pods, monkeypatch):
    """vLLM chooses a LongRoPE model's factors by the longest prompt that the server takes."""

    async def scenario(a, b):
        rpc, model = a.state.replica_rpc, a.server.engine.vllm_config.model_config
        assert "max_model_len" not in (await own_identity(a.server.engine, rpc)).properties
        long = model.hf_text_config.to_dict() | {"rope_scaling": {"rope_type": "longrope"}}
        monkeypatch.setattr(model, "hf_text_config", SimpleNamespace(to_dict=lambda: long))
        assert (await own_identity(a.server.engine, rpc)).properties["max_model_len"] == "8192"

    run_pods(scenario)


def test_identities_differ_by_what_only_one_of_them_has():
    assert Identity("a", {"x": "1"}).mismatch(Identity("b", {"x": "1"})) is None
    reason = Identity("a", {"x": "1"}).mismatch(Identity("b", {"x": "2", "y": "3"}))
    assert reason == "x '1' here, '2' there; y None here, '3' there"


# Messages that no server of this version sends.


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
        (peer,) = found.peers.values()
        assert peer.problem.startswith("UNIMPLEMENTED")
        await front.stop(0)

    run_pods(scenario)


def test_the_longest_time_without_a_peers_answer_is_below_the_time_that_pages_stay_held():
    """A peer that holds pages gives them away later than the server that reads them has noticed the broken call."""
    options = dict(peers.CHANNEL_OPTIONS)
    notices = (options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"]) / 1000
    assert notices == peers.NOTICE_SECONDS
