"""One soak of one or several servers: the load, the rests, the samples, and what they come to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from rich.console import Console

from benchmarks.soak.ledger import PAUSE_SECONDS, Ledger
from benchmarks.soak.load import OpenLoop, measure_capacity
from benchmarks.soak.machine import MachineWatch, Pause
from benchmarks.soak.mix import KINDS
from benchmarks.soak.player import Player
from benchmarks.soak.series import SPLIT_BLOCKS, Sampler, report_series, stalls_in
from benchmarks.soak.server import Soaked
from benchmarks.soak.target import PLAIN, Clients
from starling.v1 import admin_pb2 as admin

LOAD = 0.8
CAPACITY_SECONDS, SAMPLE_SECONDS, REST_SECONDS = 30, 3, 60
JUDGED_MINUTES = 5
"""In a shorter run, the memory that a server takes at its start would count as growth."""


def warm_up_minutes(minutes: float) -> float:
    """Return a quarter of the run, between one minute and five."""
    return min(max(minutes / 4, 1), 5)


async def rest(loops: Sequence[OpenLoop]) -> dict[str, float]:
    """Return what the servers still hold once all requests to any of them have ended: the largest numbers."""
    await asyncio.gather(*(loop.ended() for loop in loops))
    left = await asyncio.gather(*(loop.rest() for loop in loops))
    largest = {name: max(each[name] for each in left) for name in left[0]}
    resets = [
        await loop.player.clients.control("ResetPrefixCache", admin.ResetPrefixCacheRequest())
        for loop in loops
        if loop.player.target.front != PLAIN
    ]
    return largest | {"resets_refused": sum(not reset.reset for reset in resets)}


async def soak(
    servers: Sequence[Soaked], minutes: float, console: Console
) -> tuple[dict[str, Any], dict[str, Sampler]]:
    """Play the load on all servers at once; returns the run as JSON, and the sampler of each server by its name."""
    async with AsyncExitStack() as stack:
        machine = stack.enter_context(MachineWatch())
        ledger = Ledger(machine.pauses)
        clients = [await stack.enter_async_context(Clients(each.target)) for each in servers]
        players = [Player(each, ledger=ledger) for each in clients]
        samplers = {
            each.name: Sampler(own, each.temporary, SAMPLE_SECONDS) for each, own in zip(servers, clients, strict=True)
        }
        for player in players:
            await player.learn_answers()
        capacities = await asyncio.gather(*(measure_capacity(player, CAPACITY_SECONDS) for player in players))
        for each, capacity in zip(servers, capacities, strict=True):
            console.print(f"{each.name}: {capacity:.1f} requests/s. The load: {LOAD * capacity:.1f} requests/s.")
        loops = [OpenLoop(player, LOAD * capacity) for player, capacity in zip(players, capacities, strict=True)]
        rests = await play(loops, list(samplers.values()), warm_up_minutes(minutes) + minutes, ledger, console)
    run = {
        "minutes": minutes,
        "warm_up_minutes": warm_up_minutes(minutes),
        "capacity_requests_per_second": round(sum(capacities), 2),
        "rate_requests_per_second": round(LOAD * sum(capacities), 2),
        "requests": ledger.as_json(),
        "faults": faults(ledger),
        "machine_stood_still": [round(pause.seconds, 2) for pause in machine.pauses if pause.seconds >= PAUSE_SECONDS],
        "rests": len(rests),
        "left_after_a_rest": {name: max(each[name] for each in rests) for name in rests[0]},
    }
    run["pages_leaked"] = run["left_after_a_rest"]["pages_used"] + run["left_after_a_rest"]["pages_unexplained"]
    return run | found_in(samplers, minutes, machine.pauses), samplers


async def play(
    loops: Sequence[OpenLoop], samplers: Sequence[Sampler], minutes: float, ledger: Ledger, console: Console
) -> list[dict[str, float]]:
    """Send the load, with a rest each minute; returns what was left at each of them."""
    sampling = [asyncio.create_task(sampler.run()) for sampler in samplers]
    started, rests, shown = time.monotonic(), [], 0
    while (left := started + minutes * 60 - time.monotonic()) > 0 and not any(task.done() for task in sampling):
        await asyncio.gather(*(loop.send(min(REST_SECONDS, left)) for loop in loops))
        rests.append(await rest(loops))
        console.print(f"{ledger.requests} requests, {ledger.lost} lost, {ledger.not_sent} not sent", rests[-1])
        for detail in ledger.details[shown:]:
            console.print(detail, style="red", markup=False)
        shown = len(ledger.details)
    for task in sampling:
        if task.done():
            task.result()
        task.cancel()
    await asyncio.gather(*sampling, return_exceptions=True)
    return rests


def faults(ledger: Ledger) -> int:
    """Count the requests of clients that did what they should not, or that were ended."""
    return sum(ledger.outcomes[kind.name].total() for kind in KINDS if kind.misbehaves and kind.name in ledger.outcomes)


def found_in(samplers: Mapping[str, Sampler], minutes: float, pauses: Sequence[Pause] = ()) -> dict[str, Any]:
    """Return what the samples of the servers say. If there are several, a series has the server's name in front."""
    series, loops, split, ended = {}, {}, {}, 0
    for name, sampler in samplers.items():
        kept = [index for index, hours in enumerate(sampler.times) if hours * 60 >= warm_up_minutes(minutes)]
        times, samples = [sampler.times[i] for i in kept], [sampler.samples[i] for i in kept]
        prefix = f"{name}: " if len(samplers) > 1 else ""
        found = report_series(times, samples, judged=minutes >= JUDGED_MINUTES)
        series |= {f"{prefix}{key}": value for key, value in found.items()}
        loops[name] = stalls_in(sampler.samples, sampler.paused(pauses))
        if sampler.clients.target.replicas > 1:
            split[name] = int(sampler.samples[-1][SPLIT_BLOCKS] - sampler.samples[0][SPLIT_BLOCKS])
        ended += int(sampler.samples[0]["processes"] - sampler.samples[-1]["processes"])
    return {"processes_ended": ended, "series": series, "event_loops": loops, "split_blocks": split}
