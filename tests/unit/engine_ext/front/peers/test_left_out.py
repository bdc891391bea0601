"""Which failures take a peer out for other prompts, and how a server says so."""

from __future__ import annotations

import asyncio
import logging

import pytest
from vllm.exceptions import QueueOverflowError
from vllm.v1.core.sched.interface import PauseState

from starling.features.replicas.split import peers
from starling.features.replicas.split.engine_replica import EngineReplica
from starling.features.replicas.split.split_metrics import split_metrics
from tests.unit.engine_ext.front.peers.pods import AUTO, until
from tests.unit.engine_ext.front.simulation import TOKENS
from tests.unit.scheduler.simulation import random_ids


def fail_parts_on(pod, monkeypatch, error: Exception) -> list[int]:
    """Let each part that another server sends to a pod fail; returns a list that gets an entry for each."""
    prefill, failed = EngineReplica.prefill, []

    async def fail_there(self, first_block, stop_block):
        if self.engine is pod.server.engine and self.fails_if_paused and first_block:
            failed.append(first_block)
            raise error
        return await prefill(self, first_block, stop_block)

    monkeypatch.setattr(EngineReplica, "prefill", fail_there)
    return failed


def test_a_peer_without_memory_for_one_prompt_takes_the_next_one(run_pods):
    async def scenario(a, b):
        reserved = b.state.reservations.reserve_at_once({0: 95}, {0: 99})
        await a.server.generate(TOKENS, AUTO)
        assert b.server.work() == [[]]
        reserved.release(0)
        assert len(a.state.peers.usable) == 1
        await a.server.generate(random_ids(1, 520), AUTO)
        assert b.server.work() == [[(0, 64), (320, 480)]]

    run_pods(scenario)


def test_a_peer_whose_queue_is_full_takes_the_next_prompt(run_pods, monkeypatch):
    def refuse(*_):
        raise QueueOverflowError

    async def scenario(a, b):
        with monkeypatch.context() as patch:
            patch.setattr(b.server.engine, "check_admission", refuse)
            await a.server.generate(TOKENS, AUTO)
        assert b.server.work() == [[]]
        await a.server.generate(random_ids(1, 520), AUTO)
        assert b.server.work() == [[(0, 64), (320, 480)]]

    run_pods(scenario)


def test_a_prompt_that_fails_on_a_peer_does_not_take_the_peer_from_others(run_pods, monkeypatch):
    async def scenario(a, b):
        with monkeypatch.context() as patch:
            failed = fail_parts_on(b, patch, RuntimeError("this prompt alone"))
            outputs = await a.server.generate(TOKENS, AUTO)
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert len(failed) == 1 and a.replica.fetched == []
        await a.server.generate(random_ids(1, 520), AUTO)
        assert len(a.replica.fetched) == 1

    run_pods(scenario)


def test_a_peer_on_which_one_prompt_after_another_fails_is_left_out(run_pods, monkeypatch):
    async def scenario(a, b):
        with monkeypatch.context() as patch:
            failed = fail_parts_on(b, patch, RuntimeError("any prompt"))
            for number in range(peers.FAILURES_IN_A_ROW + 2):
                await a.server.generate(random_ids(number, 520), AUTO)
        assert len(failed) == peers.FAILURES_IN_A_ROW
        assert a.state.peers.usable == []

    run_pods(scenario)


def test_failures_with_a_success_between_them_are_not_in_a_row(run_pods, monkeypatch):
    async def scenario(a, b):
        for number in range(2 * peers.FAILURES_IN_A_ROW):
            with monkeypatch.context() as patch:
                fail_parts_on(b, patch, RuntimeError("one of two"))
                await a.server.generate(random_ids(2 * number, 520), AUTO)
            await a.server.generate(random_ids(2 * number + 1, 520), AUTO)
            assert len(a.replica.fetched) == number + 1

    run_pods(scenario)


@pytest.mark.parametrize("moment", ["before the prompt", "during its part"])
def test_a_server_says_that_it_leaves_a_paused_peer_out(run_pods, caplog, moment):
    """In the log with the reason, once for all prompts that the peer has lost, and in its metrics at once."""

    async def scenario(a, b):
        before = split_metrics().peers_left_out._value.get()
        split_metrics().usable_peers.set(1)
        prompts = [random_ids(number, 1000) for number in range(2)]
        if moment == "before the prompt":
            b.replica.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        with caplog.at_level(logging.WARNING, "vllm.starling"):
            running = [asyncio.create_task(a.server.generate(ids, AUTO, name=f"{ids[0]}")) for ids in prompts]
            if moment == "during its part":
                await until(lambda: len(b.state.internal_ids) == 2)
                b.replica.scheduler.set_pause_state(PauseState.PAUSED_ALL)
            await asyncio.gather(*running)
        said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        assert len(said) == 1
        assert said[0].startswith(f"peer {b.address} is left out for 30 s") and "paused" in said[0]
        assert split_metrics().peers_left_out._value.get() == before + 1
        assert split_metrics().usable_peers._value.get() == 0
        b.replica.scheduler.set_pause_state(PauseState.UNPAUSED)

    run_pods(scenario)
