"""Samples of a server's quantities over time, and what is allowed to grow by how much."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.soak.machine import Pause, was_paused
from benchmarks.soak.processes import sample_folder, sample_processes
from benchmarks.soak.target import Clients, series_sum, series_values
from benchmarks.soak.trend import batch_medians, fit_trend

BOUNDS = {
    "RSS": 32,
    "anonymous memory": 32,
    "descriptors": 30,
    "threads": 12,
    "sockets": 30,
    "processes": 0,
    "files in /dev/shm": 6,
    "/dev/shm, MiB": 6,
    "temporary files": 30,
    "temporary files, MiB": 6,
    "lines of metrics": 60,
    "bytes of the log": 2**62,
}
"""The allowed growth of a quantity in an hour: memory in MiB, all others as numbers."""
CURVE_POINTS = 40
SPLIT_BLOCKS = "star blocks of split prompts"
STALLS, LONGEST_STALL = "event loop stalls", "longest stall, ms"
STALL_METRICS = ("starling:event_loop_stalls_total", "starling:event_loop_longest_stall_seconds")


class Sampler:
    """Samples a server every few seconds, in a task.

    Attributes:
        times: times of the samples, in hours since the start.
        series: name -> one value for each of ``times``.
        shared: files of shared memory that the server has used.
    """

    def __init__(self, clients: Clients, temporary: Path, seconds: float) -> None:
        """Prepare the sampler; no sample is taken yet.

        Args:
            temporary: the server's folder of temporary files.
            seconds: time between two samples.
        """
        self.clients = clients
        self.temporary = temporary
        self.seconds = seconds
        self.started = 0.0
        self.times: list[float] = []
        self.samples: list[dict[str, float]] = []
        self.shared: set[str] = set()

    async def run(self) -> None:
        """Sample until the task is cancelled."""
        self.started = time.monotonic()
        while True:
            sample = await self.sample()
            self.times.append((time.monotonic() - self.started) / 3600)
            self.samples.append(sample)
            await asyncio.sleep(self.seconds)

    def paused(self, pauses: Sequence[Pause]) -> list[bool]:
        """Return, for each sample, whether the machine stood still since the one before, for as long as a stall is."""
        times = [self.started, *(self.started + 3600 * hours for hours in self.times)]
        return [was_paused(pauses, start, end, least=0, after=1) for start, end in pairwise(times)]

    async def sample(self) -> dict[str, float]:
        """Name -> value now."""
        values, files = await asyncio.to_thread(sample_processes, self.clients.target.pid)
        self.shared |= files
        values |= await asyncio.to_thread(sample_folder, self.temporary)
        text = await self.clients.metrics()
        values["lines of metrics"] = text.count("\n")
        for name in ("pages_used", "pages_cached", "requests_running", "requests_waiting"):
            values[name.replace("_", " ")] = sum(getattr(state, name) for state in await self.clients.cache())
        values["requests answered"] = series_sum(text, "vllm:request_success_total")
        values[SPLIT_BLOCKS] = series_sum(text, "starling:split_blocks_total")
        return values | stalls_of(text)


def stalls_of(text: str) -> dict[str, float]:
    """Return how often a server's event loop stood still, and for how long at most, by its watchdog in /metrics.

    Args:
        text: text of /metrics.

    Returns:
        Name of the series -> value; nothing where the server has no watchdog.
    """
    counts, longest = (series_values(text, name) for name in STALL_METRICS)
    return {STALLS: sum(counts), LONGEST_STALL: max(longest, default=0) * 1000} if counts else {}


def stalls_in(samples: Sequence[Mapping[str, float]], paused: Sequence[bool] = ()) -> dict[str, float] | None:
    """Return what the watchdog of a server counted between the first sample and the last one.

    Args:
        paused: for each sample, True if the machine stood still since the one before. Stalls of that time are counted
            apart: on a virtual machine, a thread's time on a processor has what the host took from it.

    Returns:
        {"stalls", "stalls_of_the_machine", "longest_ms"}; None where a sample has none of it. Without a stall the
        longest one is 0. Where a longer one came before the first sample, as while the server starts, or while the
        machine stood still, the watchdog still has that one.
    """
    if not samples or not all(STALLS in sample for sample in samples):
        return None
    counts = [after[STALLS] - before[STALLS] for before, after in pairwise(samples)]
    of_machine = sum(count for count, was in zip(counts, list(paused)[1:], strict=False) if was)
    stalls = sum(counts) - of_machine
    longest = round(samples[-1][LONGEST_STALL], 1) if stalls else 0
    return {"stalls": stalls, "stalls_of_the_machine": of_machine, "longest_ms": longest}


def bound_of(name: str) -> float | None:
    """Return the allowed growth of a series in an hour, or None for any."""
    return BOUNDS.get(name.rpartition(": ")[2])


def report_series(
    times: Sequence[float], samples: Sequence[Mapping[str, float]], judged: bool = True
) -> dict[str, dict[str, Any]]:
    """Return name -> the growth of a series and its verdict.

    Args:
        times: times of the samples after the warm-up, in hours.
        samples: name -> value, one mapping for each of ``times``. Series that a sample lacks are left out: their
            process ended, which the number of processes shows.
        judged: True if series with a bound have a verdict.

    Returns:
        {"first", "last", "per_hour", "interval", "bound", "verdict", "curve"}. Without a bound there is no verdict. The
        curve has up to 40 medians at equal distances.
    """
    names = [name for name in samples[0] if all(name in sample for sample in samples)]
    report = {}
    for name in names:
        values, bound = [sample[name] for sample in samples], bound_of(name)
        trend = fit_trend(times, values)
        curve = batch_medians(values, min(CURVE_POINTS, len(values)))
        report[name] = {
            "first": round(values[0], 2),
            "last": round(values[-1], 2),
            "per_hour": round(trend.slope, 2),
            "interval": [round(trend.lower, 2), round(trend.upper, 2)],
            "bound": bound,
            "verdict": trend.verdict(bound) if judged and bound is not None else None,
            "curve": [round(float(value), 2) for value in curve],
        }
    return report
