"""Which failures take a peer out for other prompts, and how a server says so."""

from __future__ import annotations

import asyncio
import logging

import pytest
from vllm.v1.core.sched.interface import PauseState

from starling.engine_ext.metrics import front_metrics
from tests.unit.engine_ext.front.peers.pods import AUTO, until
from tests.unit.scheduler.simulation import random_ids


@pytest.mark.parametrize("moment", ["before the prompt", "during its part"])
def test_a_server_says_that_it_leaves_a_paused_peer_out(run_pods, caplog, moment):
    """In the log with the reason, once for all prompts that the peer has lost, and in its metrics at once."""

    async def scenario(a, b):
        before = front_metrics().peers_left_out._value.get()
        front_metrics().usable_peers.set(1)
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
        assert front_metrics().peers_left_out._value.get() == before + 1
        assert front_metrics().usable_peers._value.get() == 0
        b.replica.scheduler.set_pause_state(PauseState.UNPAUSED)

    run_pods(scenario)
