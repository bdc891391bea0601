"""Prompts split over simulated replicas whose KV stays there: shards are held, attended to, lost and released."""

from __future__ import annotations

import asyncio

import pytest

from starling.engine_ext.front.front_state import front_state
from starling.features.replicas.replica_calls import OPEN_SHARD, RELEASE
from starling.features.replicas.split.split_prefill import ShardLost
from starling.features.replicas.split.split_state import ReplicaTimeout, split_metrics
from starling.scheduler.planning.request_metadata import metadata_of
from tests.unit.engine_ext.front.simulation import SHARDS, TOKENS, both_parts_run, whole_requests
from tests.unit.engine_ext.front.virtual_time import now, until
from tests.unit.scheduler.simulation import random_ids


def test_shards_are_held_to_the_end_and_released_after_the_request_has_left(simulate):
    async def scenario(server):
        before = split_metrics().shard_requests._value.get()
        async for _ in server.stream(TOKENS, SHARDS, max_tokens=30):
            assert [len(replica.held) for replica in server.replicas] == [1, 1, 0]
            assert [len(replica.opened) for replica in server.replicas] == [0, 1, 0]
        assert server.work() == [[(0, 320), (480, 549)], [(0, 64), (320, 480)], []]
        assert split_metrics().shard_requests._value.get() == before + 1
        (whole,) = whole_requests(server)
        metadata = metadata_of(whole)
        (shard,) = metadata.remote.shards
        assert (shard.start, shard.num_tokens) == (320, 160)
        anchor, part = (metadata_of(request).part.name for request in server.replicas[1].requests.values())
        assert shard.name == part
        opened = [index for index, call in enumerate(server.client.calls) if call[2] == OPEN_SHARD]
        assert len(opened) == 1
        assert [(rank, *args) for rank, args in server.calls(RELEASE)] == [
            (1, [anchor]),  # nothing reads this copy
            (0, []),  # answered between two steps, after the request has left
            (0, [metadata.remote.local_name]),
            (1, [anchor, part]),
        ]
        assert server.client.calls[opened[0] - 1][2] == RELEASE, "the anchor's copy is released before"

    simulate(scenario)


def test_shards_are_released_once_the_engine_has_ended_although_the_client_reads_no_more(simulate):
    """As with a gRPC client that answers pings and reads nothing: its stream may stay open for ever."""

    async def scenario(server):
        stream = server.stream(TOKENS, SHARDS, max_tokens=8)
        await anext(stream)
        assert server.names_held()
        await until(lambda: not any(replica.scheduler.requests for replica in server.replicas))
        await until(lambda: not server.names_held())
        await server.generate(random_ids(9, 549), SHARDS, "next")
        outputs = [output async for output in stream]
        assert outputs[-1].finished

    simulate(scenario)


def test_a_client_that_leaves_in_the_middle_of_its_output_leaves_no_page(simulate):
    async def scenario(server):
        stream = server.stream(TOKENS, SHARDS, max_tokens=100)
        for _ in range(3):
            await anext(stream)
        await stream.aclose()
        assert whole_requests(server)[0].num_output_tokens < 20

    simulate(scenario)


def test_a_request_whose_shard_is_lost_ends_with_the_reason(simulate):
    async def scenario(server):
        stream = server.stream(TOKENS, SHARDS, max_tokens=100)
        await anext(stream)
        server.replicas[1].running.clear()
        with pytest.raises(ShardLost, match=r"part of the prompt's KV is unavailable.*replica 1 does not answer"):
            async for _ in stream:
                pass
        server.replicas[1].running.set()

    simulate(scenario)


def test_with_shards_a_replica_that_hangs_at_its_part_is_an_error(simulate):
    """No one replica may have the memory for the whole prompt."""

    async def scenario(server):
        running = asyncio.create_task(server.generate(TOKENS, SHARDS))
        await both_parts_run(server)
        server.replicas[1].running.clear()
        with pytest.raises(ReplicaTimeout, match="replica 1 has not answered"):
            await running
        assert not whole_requests(server)
        server.replicas[1].running.set()

    simulate(scenario)


def test_a_replica_that_owes_an_answer_is_still_called_to_release(simulate):
    """The client does not wait for it, and other prompts do not reserve its pages until it has timed out again."""

    async def scenario(server):
        state = front_state(server.engine).replicas.state
        hanging = server.replicas[1]
        ended = None
        async for output in server.stream(TOKENS, SHARDS):
            if output.finished:
                hanging.running.clear()
                with pytest.raises(ReplicaTimeout):
                    await state.rpc.call(server.engine, 1, RELEASE, [])
                ended = now()
        assert now() - ended < 3
        assert len(hanging.held) == 1
        assert state.reservations.reserved.total()
        hanging.running.set()

    simulate(scenario)


def test_memory_of_a_replica_that_hangs_stays_reserved_until_it_has_answered(simulate):
    """However long that takes; what the other replicas have released can be reserved at once."""

    async def scenario(server):
        state = front_state(server.engine).replicas.state
        hanging = server.replicas[1]
        async for output in server.stream(TOKENS, SHARDS):
            if output.finished:
                hanging.running.clear()
        await asyncio.sleep(10 * state.rpc.timeout)
        assert len(hanging.held) == 1
        assert (+state.reservations.reserved).keys() == {1}
        hanging.running.set()
        await until(lambda: not state.reservations.reserved.total())
        assert not hanging.held

    simulate(scenario)


def test_a_prompt_that_waits_for_the_memory_of_a_replica_that_hangs_ends_with_an_error(simulate):
    """It does not hold up the prompts behind it either, which get other replicas."""

    async def scenario(server):
        hanging = server.replicas[1]
        first = asyncio.create_task(server.generate(random_ids(1, 520), SHARDS, "first", max_tokens=30))
        await until(lambda: server.calls(OPEN_SHARD))
        second = asyncio.create_task(server.generate(random_ids(2, 520), SHARDS, "second"))
        await until(front_state(server.engine).replicas.state.reservations.turn.locked)
        hanging.running.clear()
        third = asyncio.create_task(server.generate(random_ids(3, 520), SHARDS, "third"))
        results = await asyncio.gather(first, second, third, return_exceptions=True)
        assert [type(result) for result in results] == [ShardLost, ReplicaTimeout, list]
        assert results[2][-1].finished
        hanging.running.set()

    simulate(scenario, num_pages=21)


def test_prompts_with_shards_reserve_their_memory_at_once_and_in_turn(simulate):
    """Each takes more than half of a replica: the second one begins once the first one has released its pages."""

    async def scenario(server):
        ended = {}

        async def generate(name: str, **sampling) -> None:
            await server.generate(random_ids(len(name), 520), SHARDS, name, **sampling)
            ended[name] = now()

        await asyncio.gather(generate("a", max_tokens=10), generate("bc", n=2, temperature=1.0))
        opened = [time for time, _, name, _ in server.client.calls if name == OPEN_SHARD]
        assert opened[0] < ended["a"] < opened[1] < ended["bc"]
        requests = [request for replica in server.replicas for request in replica.requests.values()]
        assert not any(request.num_preemptions for request in requests)

    simulate(scenario, num_pages=21)
