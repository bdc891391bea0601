"""How long a server may still begin to fetch a peer's pages: until the peer may free them, whatever stands still."""

from __future__ import annotations

import asyncio

import pytest

from starling.engine_ext.serving.grpc import replica_service
from starling.features.replicas import clock
from starling.features.replicas.replica_calls import CANCEL_FETCH, EXTEND_FETCH
from starling.features.replicas.split import peers
from starling.features.replicas.split.engine_replica import EngineReplica
from starling.features.replicas.split.peer_replica import PeerLost, PeerReplica
from starling.scheduler.star.request_metadata import metadata_of
from tests.unit.engine_ext.front.peers.pods import AUTO, TIMEOUT, session_of, stop_before_the_whole_request, until
from tests.unit.engine_ext.front.simulation import TOKENS, whole_requests
from tests.unit.scheduler.simulation import random_ids


class Clock:
    """The clock of leases; the test sets it."""

    seconds = 1000.0

    def now(self) -> float:
        return self.seconds


@pytest.fixture
def lease_clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(clock, "now", made.now)
    return made


def test_a_server_that_stands_still_until_its_peer_has_freed_the_pages_reads_none(run_pods, lease_clock, monkeypatch):
    """All its processes are stopped before the engine takes the request in, and its engine is the first to go on."""
    front_goes_on = asyncio.Event()
    cancel_fetch = EngineReplica.cancel_fetch

    async def at_once(seconds):
        pass

    async def cancel_when_the_front_goes_on(self, names):
        await front_goes_on.wait()
        await cancel_fetch(self, names)

    async def scenario(a, b):
        stop_before_the_whole_request(a)
        running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        await until(lambda: not a.replica.running.is_set())
        assert b.replica.held
        await b.front.server.stop(None)
        lease_clock.seconds += peers.hold_seconds(TIMEOUT)
        await until(lambda: not b.replica.held)
        await b.server.generate(random_ids(5, 3000), {})  # over the pages that were free
        a.replica.running.set()
        await until(lambda: whole_requests(a.server))
        await until(lambda: a.replica.fetched or whole_requests(a.server)[0].num_output_tokens)
        front_goes_on.set()
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.replica.fetched == []
        assert max(stop for _, stop in a.replica.work.values()) == 522

    monkeypatch.setattr(replica_service, "until_noticed", at_once)
    monkeypatch.setattr(EngineReplica, "cancel_fetch", cancel_when_the_front_goes_on)
    run_pods(scenario)


def test_time_counts_from_the_question_however_late_the_answer_is_read(run_pods, lease_clock, monkeypatch):
    """The peer may have answered, and its call may have broken, before this process stood still."""
    renew = PeerReplica.renew
    deadlines = []

    async def scenario(a, b):
        async def stand_still(self):
            answered = self._answered.set

            def late() -> None:
                lease_clock.seconds += 500
                answered()

            self._answered.set = late
            deadlines.append(await renew(self))
            return deadlines[-1]

        monkeypatch.setattr(PeerReplica, "renew", stand_still)
        await a.server.generate(TOKENS, AUTO)
        assert deadlines[0] == 1000 + peers.fetch_seconds(TIMEOUT)
        assert a.replica.fetched == []

    run_pods(scenario)


def test_a_fetch_that_waits_for_its_turn_may_begin_as_long_as_the_peer_answers(run_pods, lease_clock):
    async def scenario(a, b):
        connector = a.replica.scheduler.connector
        look_up, has_its_turn = connector.get_num_new_matched_tokens, False

        def wait_for_its_turn(request, num_computed_tokens):
            waits = metadata_of(request).fetch is not None and not has_its_turn
            return (None, False) if waits else look_up(request, num_computed_tokens)

        connector.get_num_new_matched_tokens = wait_for_its_turn
        running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        await until(lambda: whole_requests(a.server))
        for _ in range(5):
            lease_clock.seconds += peers.fetch_seconds(TIMEOUT) * 0.9
            count = len(a.server.calls(EXTEND_FETCH))
            await until(lambda count=count: len(a.server.calls(EXTEND_FETCH)) > count + 1)
        has_its_turn = True
        await running
        assert a.replica.fetched
        assert max(args[1] for _, args in a.server.calls(EXTEND_FETCH)) > 1000 + 4 * peers.fetch_seconds(TIMEOUT)

    run_pods(scenario)


@pytest.mark.parametrize("moment", ["before the fetch", "during the fetch"])
def test_a_peer_does_not_hold_pages_for_an_engine_that_hangs(run_pods, monkeypatch, moment):
    """However long: the front of that engine still answers, and would renew the lease for ever."""
    renew, renewals = PeerReplica.renew, []

    async def count(self):
        renewals.append(self)
        return await renew(self)

    async def scenario(a, b):
        monkeypatch.setattr(PeerReplica, "renew", count)
        if moment == "before the fetch":
            stop_before_the_whole_request(a)
        a.replica.loads_arrive = False
        running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        if moment == "during the fetch":
            await until(lambda: a.replica.fetched)
            a.replica.running.clear()
        await until(lambda: not a.replica.running.is_set())
        assert b.replica.held
        a.state.rpc.timeout = 0.2
        await until(lambda: not b.replica.held or len(renewals) > 30)
        assert not b.replica.held and not running.done()
        a.state.rpc.timeout = TIMEOUT
        a.replica.running.set()
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert max(stop for _, stop in a.replica.work.values()) == 522

    run_pods(scenario)


def test_a_peer_that_is_lost_holds_no_pages_on(run_pods, monkeypatch):
    async def scenario(a, b):
        stop_before_the_whole_request(a)
        running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        await until(lambda: not a.replica.running.is_set())
        session = session_of(a)
        assert await session.renew() > clock.now()
        await b.front.server.stop(None)
        await until(lambda: session.has_lost_pages)
        with pytest.raises(PeerLost, match="is lost"):
            await session.renew()
        await until(lambda: a.server.calls(CANCEL_FETCH))
        a.replica.running.set()
        await running
        assert a.replica.fetched == []

    async def at_once(seconds):
        pass

    monkeypatch.setattr(replica_service, "until_noticed", at_once)
    run_pods(scenario)


def test_the_first_pages_arrive_before_the_peer_may_free_them():
    for timeout in (0.5, 30, 600):
        assert peers.fetch_seconds(timeout) + timeout < peers.hold_seconds(timeout)
