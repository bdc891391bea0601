"""Peers that are restarted, or leave: this server's workers close their connections to what was there."""

from __future__ import annotations

import asyncio

import pytest

from starling.features.replicas.replica_calls import FORGET_SERVERS
from starling.features.replicas.split import peers
from starling.features.replicas.split.peers import Identity
from tests.unit.engine_ext.front.peers.pods import Pod, until


def forgotten(pod: Pod) -> list[str]:
    return [server for _, (servers,) in pod.server.calls(FORGET_SERVERS) for server in servers]


def answer(peer: peers.Peer, monkeypatch, name: str | None) -> None:
    """Let a peer say that it is another server; None: it does not answer."""
    properties = peer.identity.properties if peer.identity is not None else {}

    async def describe() -> Identity | str:
        return "UNAVAILABLE" if name is None else Identity(name, properties)

    monkeypatch.setattr(peer, "describe", describe)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr("starling.engine_ext.serving.grpc.server.HEALTH_CHECK_SECONDS", 0.01)


@pytest.mark.usefixtures("soon")
def test_the_workers_forget_each_server_that_another_one_has_replaced(run_pods, monkeypatch):
    async def scenario(a, b):
        a.front.peers = found = a.state.peers
        (peer,) = found.usable
        for number in range(3):
            answer(peer, monkeypatch, f"start {number}-0")
            await found.refresh()
        await until(lambda: len(forgotten(a)) >= 2)
        await found.refresh()
        await until(lambda: not a.state.releases)
        assert forgotten(a) == ["start 0", "start 1"]

    run_pods(scenario)


def test_a_server_whose_name_leads_elsewhere_is_gone_unless_another_address_leads_to_it(run_pods, monkeypatch):
    async def scenario(a, b, c):
        found = a.state.peers
        for peer, name in zip(found.usable, ("b-0", "c-0"), strict=True):
            answer(peer, monkeypatch, name)
        await found.refresh()
        found.take_gone()
        for address, other in ((b.address, "x-0"), (c.address, "b-0")):
            answer(found.by_address[address], monkeypatch, other)
        await found.refresh()
        assert found.take_gone() == ["c"]
        found.entries = [a.address, b.address]
        await found.refresh()
        assert found.take_gone() == ["b"]
        assert found.take_gone() == []

    run_pods(scenario, 3)


def test_a_server_that_does_not_answer_for_long_is_gone_and_one_that_is_slow_is_not(run_pods, monkeypatch):
    async def scenario(a, b):
        found, loop = a.state.peers, asyncio.get_running_loop()
        (peer,) = found.usable
        answer(peer, monkeypatch, "b-0")
        await found.refresh()
        found.take_gone()
        answer(peer, monkeypatch, None)
        await found.refresh()
        assert found.take_gone() == []
        later = loop.time() + peers.GONE_SECONDS + 1
        with monkeypatch.context() as patch:
            patch.setattr(loop, "time", lambda: later)
            await found.refresh()
        assert found.take_gone() == ["b"]
        await found.refresh()
        assert found.take_gone() == []

    run_pods(scenario)
