"""Split prompts that are interrupted at each point where one of their tasks waits: nothing may stay behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from starling.engine_ext.front.front_state import front_state
from tests.unit.engine_ext.front.interruption import interrupted
from tests.unit.engine_ext.front.simulation import SHARDS, STAR, Server
from tests.unit.scheduler.simulation import random_ids

SAMPLING = {"max_tokens": 3, "n": 2, "temperature": 1.0}


async def left_behind(server: Server) -> list[object]:
    """What requests have left in the front and in the replicas, once the front has released what it had to."""
    state = front_state(server.engine).replicas.state
    await asyncio.gather(*state.releases)
    await asyncio.sleep(1)
    left = [
        *server.names_held(),
        *state.split_requests,
        *state.internal_ids,
        *server.engine.output_processor.request_states,
        *(name for replica in server.replicas for name in replica.scheduler.requests),
    ]
    return left + [dict(state.reservations.reserved)] * bool(state.reservations.reserved.total())


async def interrupt_everywhere(
    server: Server, star: dict, sampling: dict, interrupt: Callable[[asyncio.Task, int], None]
) -> dict[int, list[object]]:
    """What stays behind, by the number of the wait at which a prompt was interrupted for the first time."""
    left, at, found = {}, 0, True
    while found:
        at += 1
        prompt = random_ids(at, 520)
        times = iter(range(10**6))
        found = await interrupted(
            server.generate(prompt, star, **sampling), at, lambda task, times=times: interrupt(task, next(times))
        )
        if behind := await left_behind(server):
            left[at] = behind
            break
    assert left or at > 30
    return left


@pytest.mark.parametrize(
    ("again", "sampling"), [(False, {}), (True, {}), (True, SAMPLING)], ids=["once", "again and again", "two choices"]
)
@pytest.mark.parametrize("star", [STAR, SHARDS], ids=["fetched", "shards"])
def test_a_cancelled_prompt_leaves_nothing(simulate, star, sampling, again):
    """A server cancels the task of a client that has left once, or, as anyio does, at each wait until it has ended."""

    def cancel(task: asyncio.Task, times: int) -> None:
        if again or not times:
            task.cancel()

    async def scenario(server):
        assert await interrupt_everywhere(server, star, sampling, cancel) == {}

    simulate(scenario)


@pytest.mark.parametrize("star", [STAR, SHARDS], ids=["fetched", "shards"])
def test_a_prompt_aborted_by_its_id_ends_and_leaves_nothing(simulate, star):
    async def scenario(server):
        aborts = []

        def abort(task: asyncio.Task, times: int) -> None:
            if not times:
                aborts.append(asyncio.ensure_future(server.engine.abort("me")))

        assert await interrupt_everywhere(server, star, {}, abort) == {}
        await asyncio.gather(*aborts)

    simulate(scenario)
