"""Prompts split over simulated replicas: how requests end that are cancelled, fail, or meet replicas that hang."""

from __future__ import annotations

import asyncio

import pytest
from vllm.exceptions import QueueOverflowError
from vllm.v1.engine.exceptions import EngineDeadError

from starling.engine_ext.front.front_state import front_state
from starling.features.replicas.replica_calls import RELEASE
from starling.features.replicas.split.split_state import ReplicaTimeout
from starling.scheduler.planning.request_metadata import metadata_of
from tests.unit.engine_ext.front.simulation import (
    SHARDS,
    STAR,
    TOKENS,
    both_parts_run,
    whole_requests,
)
from tests.unit.engine_ext.front.virtual_time import now, until
from tests.unit.scheduler.simulation import random_ids


@pytest.mark.parametrize("star", [STAR, SHARDS], ids=["fetched", "shards"])
def test_a_cancel_in_the_middle_ends_every_part(simulate, star):
    async def scenario(server):
        running = asyncio.create_task(server.generate(TOKENS, star))
        await both_parts_run(server)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not whole_requests(server)

    simulate(scenario)


def test_an_abort_by_id_ends_the_request(simulate):
    async def scenario(server):
        running = asyncio.create_task(server.generate(TOKENS, STAR))
        await both_parts_run(server)
        await server.engine.abort("me")
        (output,) = await running
        assert output.outputs[0].finish_reason == "abort"
        assert not whole_requests(server)

    simulate(scenario)


def test_a_part_that_fails_ends_the_others_and_its_error_is_raised(simulate):
    async def scenario(server):
        server.client.refused[1] = RuntimeError("no")
        with pytest.raises(RuntimeError, match="no"):
            await server.generate(TOKENS, STAR)
        assert not whole_requests(server)
        assert server.work()[0] != [(0, 320)], "the part is complete"

    simulate(scenario)


def test_a_dead_engine_is_not_called_to_release(simulate):
    async def scenario(server):
        running = asyncio.create_task(server.generate(TOKENS, STAR))
        await both_parts_run(server)
        server.client.die()
        with pytest.raises(EngineDeadError):
            await running
        assert server.calls(RELEASE) == []

    simulate(scenario)


def test_a_full_server_refuses_before_anything_is_computed(simulate, server_config, monkeypatch):
    monkeypatch.setattr(server_config.scheduler_config, "max_num_queued_reqs", 0)

    async def scenario(server):
        with pytest.raises(QueueOverflowError):
            await server.generate(TOKENS, STAR)
        assert server.client.calls == []

    simulate(scenario)


def test_the_part_of_a_replica_that_hangs_is_computed_by_another_one(simulate):
    """The whole prompt goes to a replica that answers, and so do the next ones, until the replica is back."""

    async def scenario(server):
        hanging = server.replicas[0]
        timeout = front_state(server.engine).rpc.timeout
        running = asyncio.create_task(server.generate(TOKENS, STAR))
        await both_parts_run(server)
        hanging.running.clear()
        assert (await running)[-1].finished
        assert timeout < now() < timeout + 10
        (whole,) = whole_requests(server, 1)
        assert metadata_of(whole).fetch is None

        started = now()
        other = random_ids(1, 520)
        await server.generate(other, STAR)
        assert now() - started < timeout / 2, "the replica that still owes an answer is not called again"
        assert [len(whole_requests(server, rank)) for rank in range(3)] == [0, 2, 0]
        assert metadata_of(whole_requests(server, 1)[1]).fetch is not None

        hanging.running.set()
        await asyncio.sleep(1)
        await server.generate(random_ids(2, 520), STAR)
        assert len(whole_requests(server, 0)) == 1

    simulate(scenario)


def test_a_response_does_not_wait_for_a_replica_that_hangs_at_the_end(simulate):
    async def scenario(server):
        running = asyncio.create_task(server.generate(TOKENS, STAR))
        await until(lambda: whole_requests(server) and whole_requests(server)[0].num_output_tokens)
        server.replicas[1].running.clear()
        started = now()
        assert (await running)[-1].finished
        assert now() - started < 3
        assert server.replicas[1].held
        server.replicas[1].running.set()

    simulate(scenario)


def test_no_replica_answers(simulate):
    async def scenario(server):
        for replica in server.replicas:
            replica.running.clear()
        with pytest.raises(ReplicaTimeout, match="replica 0 has not answered for 30 s"):
            await server.generate(TOKENS, STAR)
        for replica in server.replicas:
            replica.running.set()

    simulate(scenario)
