"""In which order split prompts reserve the KV pages of replicas."""

from __future__ import annotations

import asyncio

from starling.features.replicas.split.split_state import KVReservations
from tests.unit.engine_ext.front.virtual_time import run


def test_a_prompt_waits_until_all_that_it_needs_is_free():
    async def scenario():
        reservations, capacity = KVReservations(), {0: 10}
        first = await reservations.reserve({0: 8}, capacity)
        second = asyncio.ensure_future(reservations.reserve({0: 8}, capacity))
        third = asyncio.ensure_future(reservations.reserve({0: 2}, capacity))
        await asyncio.sleep(0.01)
        assert not second.done()
        assert not third.done()  # first come, first served
        first.release(0)
        first.release(0)
        held = await second
        last = await third
        assert reservations.reserved[0] == 10
        held.release(0)
        waiting = asyncio.ensure_future(reservations.reserve({0: 9}, capacity))
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
        first = await reservations.reserve({0: 8, 1: 8}, capacity)
        first.release(0)
        assert await reservations.reserve({0: 8, 2: 8}, capacity)
        waiting = asyncio.ensure_future(reservations.reserve({1: 8}, capacity))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        first.release(1)
        await waiting
        assert reservations.reserved == {0: 8, 1: 8, 2: 8}

    run(scenario)
