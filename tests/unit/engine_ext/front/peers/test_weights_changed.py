"""Weights that are changed while a server runs: its KV is not mixed with that of other servers any more."""

from __future__ import annotations

import asyncio
import logging

import pytest

from starling.features.replicas.split.split_metrics import split_metrics
from tests.unit.engine_ext.front.peers.pods import AUTO, Pod, stop_before_the_whole_request, until
from tests.unit.engine_ext.front.simulation import TOKENS
from tests.unit.scheduler.simulation import random_ids


async def call_workers(pod: Pod, method: str) -> None:
    """As vLLM's front does for /collective_rpc, and for its RL endpoints."""
    await pod.server.client._call_utility_async("collective_rpc", method, None, [], None, engine=pod.replica)


def test_a_peer_whose_weights_were_changed_is_refused_from_then_on(run_pods, caplog):
    async def scenario(a, b):
        await a.server.generate(TOKENS, AUTO)
        assert len(a.replica.fetched) == 1
        with caplog.at_level(logging.WARNING, "vllm.starling"):
            await call_workers(b, "reload_weights")
            for number in range(2):
                outputs = await a.server.generate(random_ids(number, 520), AUTO)
                assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert len(a.replica.fetched) == 1
        reason = "the weights of this server may have changed since its start, by reload_weights"
        assert caplog.text.count(f"no prompt is split with peers from now on: {reason}; restart it") == 1
        assert "weights may have changed since its start, by reload_weights" in caplog.text.split("is left out")[1]
        await a.state.peers.refresh()
        assert "changed by reload_weights' there" in a.state.peers.by_address[b.address].problem
        await a.server.generate(random_ids(9, 520), AUTO)
        assert len(b.server.work()[0]) == 2, "the anchor and the part of the first prompt"

    run_pods(scenario)


def test_a_server_whose_weights_were_changed_splits_no_prompt(run_pods):
    async def scenario(a, b):
        await call_workers(a, "reload_weights")
        outputs = await a.server.generate(TOKENS, AUTO)
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert b.server.work() == [[]]
        assert a.state.peers.usable == []
        await a.state.peers.refresh()
        assert split_metrics().usable_peers._value.get() == 0

    run_pods(scenario)


def test_a_part_during_which_the_weights_were_changed_is_not_used(run_pods):
    async def scenario(a, b):
        running = asyncio.create_task(a.server.generate(random_ids(3, 2000), AUTO))
        await until(lambda: b.replica.work)
        await call_workers(b, "reload_weights")
        outputs = await running
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.replica.fetched == []
        assert max(stop for _, stop in a.replica.work.values()) == 2002

    run_pods(scenario)


def test_pages_that_were_computed_before_the_change_are_fetched(run_pods):
    async def scenario(a, b):
        stop_before_the_whole_request(a)
        running = asyncio.create_task(a.server.generate(TOKENS, AUTO))
        await until(lambda: not a.replica.running.is_set())
        await call_workers(b, "reload_weights")
        a.replica.running.set()
        await running
        assert len(a.replica.fetched) == 1

    run_pods(scenario)


@pytest.mark.parametrize("asked", [0, 1])
def test_calls_that_leave_the_weights_alone_change_nothing(run_pods, asked):
    async def scenario(*pods):
        await call_workers(pods[asked], "get_model_inspection")
        await pods[0].server.generate(TOKENS, AUTO)
        assert len(pods[0].replica.fetched) == 1

    run_pods(scenario)
