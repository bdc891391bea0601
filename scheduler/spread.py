"""Which replica prefills which star blocks of one prompt. Pure functions; work is counted in star blocks.

Phase 1 of Star Attention needs nothing of other blocks but the anchor (arXiv 2411.17116, section 2.1), so blocks may
be prefilled anywhere. A replica gets one contiguous run of them. The first run's replica has block 0, and with it the
anchor, in its own cache; every other one computes the anchor once more or finds it in its prefix cache. The first
run's replica is also where the query runs: it holds the longest run, so the least has to move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BISECTIONS = 32


@dataclass(frozen=True)
class Replica:
    """What a replica has to do with a prompt before it starts on it.

    Attributes:
        cached: the star blocks of the prompt whose pages are all in its prefix cache.
        has_anchor: whether those of the anchor are.
        load: work that is queued there already.
        room: star blocks that its memory takes.
    """

    cached: frozenset[int] = frozenset()
    has_anchor: bool = False
    load: float = 0.0
    room: float = math.inf


@dataclass(frozen=True)
class Run:
    """Star blocks ``first`` to ``stop - 1``, for the replica of that index."""

    replica: int
    first: int
    stop: int


def spread_blocks(num_blocks: int, anchor_work: float, replicas: Sequence[Replica], most: int) -> list[Run]:
    """Split blocks over at most ``most`` replicas, so that the last one is done as early as can be.

    Args:
        num_blocks: star blocks of the prompt, 1 or more.
        anchor_work: what the anchor costs, A / B.
        replicas: all there are, by index.

    Returns:
        Runs in the order of their blocks, none empty; the first one's replica runs the query.

    Raises:
        ValueError: they have no room for all blocks.
    """
    order = _order(num_blocks, replicas)[:most]
    low, high = 0.0, max(replica.load for replica in replicas) + num_blocks + anchor_work
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _fill(num_blocks, anchor_work, replicas, order, middle) is None:
            low = middle
        else:
            high = middle
    runs = _fill(num_blocks, anchor_work, replicas, order, high)
    if runs is None:
        room = sum(replicas[index].room for index in order)
        raise ValueError(f"{num_blocks} star blocks, and {len(order)} replicas have room for {room:.0f}")
    return runs


def run_work(run: Run, anchor_work: float, replica: Replica) -> float:
    """When a replica is done with its run."""
    anchor = 0.0 if run.first == 0 or replica.has_anchor else anchor_work
    return replica.load + anchor + sum(block not in replica.cached for block in range(run.first, run.stop))


def best_number(num_blocks: int, anchor_work: float, most: int) -> int:
    """The fewest of ``most`` idle, empty replicas that are as fast as all of them."""

    def work(number: int) -> float:
        runs = spread_blocks(num_blocks, anchor_work, [Replica()] * number, number)
        return max(run_work(run, anchor_work, Replica()) for run in runs)

    return min(range(1, min(most, num_blocks) + 1), key=lambda number: (round(work(number), 6), number))


def _order(num_blocks: int, replicas: Sequence[Replica]) -> list[int]:
    """First the one that holds most of the prompt's start, then by where their cached blocks begin; the idle before
    the busy."""

    def leading(replica: Replica) -> int:
        return next((block for block in range(num_blocks) if block not in replica.cached), num_blocks)

    by_index = range(len(replicas))
    first = min(
        by_index,
        key=lambda index: (replicas[index].load - leading(replicas[index]), len(replicas[index].cached), index),
    )
    rest = sorted(
        (index for index in by_index if index != first),
        key=lambda index: (min(replicas[index].cached, default=num_blocks), replicas[index].load, index),
    )
    return [first, *rest]


def _fill(
    num_blocks: int, anchor_work: float, replicas: Sequence[Replica], order: Sequence[int], until: float
) -> list[Run] | None:
    """Give each replica in turn all it can do ``until`` then; None where blocks are left over."""
    runs, first = [], 0
    for index in order:
        replica, stop = replicas[index], first
        work = run_work(Run(index, first, first), anchor_work, replica)
        while (
            stop < num_blocks and stop - first < replica.room and (work := work + (stop not in replica.cached)) <= until
        ):
            stop += 1
        if stop > first:
            runs.append(Run(index, first, stop))
        elif not runs:
            return None  # the first run's replica is where the query runs
        first = stop
    return runs if first == num_blocks else None
