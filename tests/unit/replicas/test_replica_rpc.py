"""Calls to replicas that answer late, or never."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from starling.features.replicas.split.split_state import ReplicaRPC, ReplicaTimeout
from tests.unit.engine_ext.front.virtual_time import now, run

TIMEOUT = 30.0


class FakeEngine:
    """Its replicas answer once their gate is open."""

    def __init__(self) -> None:
        self.errored = False
        self.dead_error = EngineDeadError()
        self.gates = {rank: asyncio.Event() for rank in range(2)}
        self.gates[1].set()
        self.called: list[tuple] = []
        self.engine_core = SimpleNamespace(_call_utility_async=self.answer, core_engines=list(self.gates))

    async def answer(self, name: str, *args, engine: int):
        self.called.append((engine, name, *args))
        await self.gates[engine].wait()
        return args


def test_an_answer_in_time_is_returned():
    async def scenario():
        engine, rpc = FakeEngine(), ReplicaRPC(TIMEOUT)
        assert await rpc.call(engine, 1, "name", 2, 3) == (2, 3)
        asyncio.get_running_loop().call_later(TIMEOUT - 1, engine.gates[0].set)
        assert await rpc.call(engine, 0, "name") == ()
        assert not rpc.is_unresponsive(0)

    run(scenario)


def test_a_replica_that_owes_an_answer_is_not_called_again_until_it_has_answered():
    async def scenario():
        engine, rpc = FakeEngine(), ReplicaRPC(TIMEOUT)
        with pytest.raises(ReplicaTimeout, match="replica 0 has not answered for 30 s"):
            await rpc.call(engine, 0, "first")
        assert TIMEOUT <= now() < TIMEOUT + 2
        assert rpc.is_unresponsive(0)
        assert not rpc.is_unresponsive(1)
        with pytest.raises(ReplicaTimeout):
            await rpc.call(engine, 0, "second")
        assert now() < TIMEOUT + 2, "at once"
        with pytest.raises(ReplicaTimeout):
            await rpc.call(engine, 0, "third", always=True)
        assert [name for _, name in engine.called] == ["first", "third"]
        engine.gates[0].set()
        await asyncio.sleep(0.1)
        assert not rpc.is_unresponsive(0)
        assert await rpc.call(engine, 0, "fourth") == ()

    run(scenario)


def test_a_call_to_an_engine_that_dies_ends_with_its_error():
    async def scenario():
        engine, rpc = FakeEngine(), ReplicaRPC(TIMEOUT)
        asyncio.get_running_loop().call_later(3, setattr, engine, "errored", True)
        with pytest.raises(EngineDeadError):
            await rpc.call(engine, 0, "name")
        assert now() < 5
        assert not rpc.is_unresponsive(0)

    run(scenario)


def test_an_error_of_the_call_is_raised():
    async def scenario():
        engine, rpc = FakeEngine(), ReplicaRPC(TIMEOUT)
        with pytest.raises(IndexError):
            await rpc.call(engine, 2, "name")

    run(scenario)


def test_all_replicas_are_asked_and_those_that_answer_in_time_count():
    """The one that does not is not asked the same again until it has answered; its late answer is out of date."""

    async def scenario():
        engine, rpc = FakeEngine(), ReplicaRPC(TIMEOUT)
        both = [rpc.ask_all(engine, 5, "state", 1) for _ in range(2)]
        assert await asyncio.gather(*both) == [{1: (1,)}] * 2
        assert now() == 5
        assert await rpc.ask_all(engine, 5, "state", 1) == {1: (1,)}
        assert now() == 5, "it is not waited for again"
        assert await rpc.ask_all(engine, 5, "state", 2) == {1: (2,)}
        assert [call for call in engine.called if call[0] == 0] == [(0, "state", 1), (0, "state", 2)]
        assert not rpc.is_unresponsive(0), "a long step is no reason to leave a replica out of prompts"
        engine.gates[0].set()
        await asyncio.sleep(3600)
        assert await rpc.ask_all(engine, 5, "state", 1) == {0: (1,), 1: (1,)}
        assert len([call for call in engine.called if call == (0, "state", 1)]) == 2, "the answer of an hour ago"

    run(scenario)


def test_what_all_replicas_are_asked_ends_with_the_engine():
    async def scenario():
        engine, rpc = FakeEngine(), ReplicaRPC(TIMEOUT)
        asyncio.get_running_loop().call_later(3, setattr, engine, "errored", True)
        with pytest.raises(EngineDeadError):
            await rpc.ask_all(engine, 20, "state")
        assert now() < 5

    run(scenario)
