"""In which order split prompts reserve the KV pages of replicas."""

from __future__ import annotations

import asyncio

from engine_ext.front.kv_reservations import KVReservations
from tests.unit.engine_ext.front.virtual_time import run


def test_prompts_that_fetch_pages_wait_for_prompts_with_shards_only():
    async def scenario():
        reservations, capacity = KVReservations(), {0: 10}
        one = await reservations.reserve({0: 8}, capacity, False)
        other = await reservations.reserve({0: 8}, capacity, False)
        shards = asyncio.ensure_future(reservations.reserve({0: 8}, capacity, True))
        fetches = asyncio.ensure_future(reservations.reserve({0: 8}, capacity, False))
        for reservation in (one, other):
            await asyncio.sleep(0.01)
            assert not shards.done()
            assert not fetches.done()
            reservation.release(0)
        held = await shards
        await asyncio.sleep(0.01)
        assert not fetches.done()
        held.release(0)
        held.release(0)
        last = await fetches
        assert reservations.reserved[0] == 8
        assert not reservations.num_with_shards
        waiting = asyncio.ensure_future(reservations.reserve({0: 8}, capacity, True))
        await asyncio.sleep(0.01)
        waiting.cancel()  # reserves nothing
        await asyncio.sleep(0.01)
        last.release(0)
        assert reservations.reserved[0] == 0
        assert not reservations.turn.locked()

    run(scenario)


def test_the_memory_of_each_replica_is_given_back_on_its_own():
    """As one replica hangs: other prompts wait for its memory alone."""

    async def scenario():
        reservations, capacity = KVReservations(), {0: 10, 1: 10, 2: 10}
        first = await reservations.reserve({0: 8, 1: 8}, capacity, True)
        first.release(0)
        assert await reservations.reserve({0: 8, 2: 8}, capacity, True)
        waiting = asyncio.ensure_future(reservations.reserve({1: 8}, capacity, True))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        first.release(1)
        await waiting
        assert reservations.num_with_shards == 2

    run(scenario)
