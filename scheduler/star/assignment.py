"""Which replica prefills which star blocks of one prompt. Pure functions; work is counted in star blocks.

Phase 1 of Star Attention needs nothing of other blocks but the anchor (arXiv 2411.17116, section 2.1), so any replica
may prefill any block. Each replica gets one contiguous range of blocks. The replica of the first range computes
block 0, and with it the anchor; every other replica computes the anchor once more or finds it in its prefix cache. The
query also runs on the replica of the first range: that range is the longest, so the fewest pages have to move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BISECTIONS = 32


@dataclass(frozen=True)
class ReplicaState:
    """A replica before it starts on a prompt.

    Attributes:
        cached_blocks: the star blocks of the prompt whose pages are all in its prefix cache.
        has_anchor: whether the pages of the anchor are.
        load: work that is queued there already.
        max_blocks: star blocks that its memory takes.
    """

    cached_blocks: frozenset[int] = frozenset()
    has_anchor: bool = False
    load: float = 0.0
    max_blocks: float = math.inf


@dataclass(frozen=True)
class Assignment:
    """Star blocks ``first`` to ``stop - 1``, for the replica of that index."""

    replica: int
    first: int
    stop: int


def assign_blocks(
    num_blocks: int, anchor_work: float, replicas: Sequence[ReplicaState], max_replicas: int
) -> list[Assignment]:
    """Split blocks over at most ``max_replicas`` replicas, so that the last replica is done as early as possible.

    Args:
        num_blocks: star blocks of the prompt, 1 or more.
        anchor_work: the work of computing the anchor, A / B.
        replicas: all replicas, by index.

    Returns:
        Assignments in the order of their blocks, none empty; the first one's replica runs the query.

    Raises:
        ValueError: the replicas' memory does not take all blocks.
    """
    order = _order(num_blocks, replicas)[:max_replicas]
    low, high = 0.0, max(replica.load for replica in replicas) + num_blocks + anchor_work
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _fill(num_blocks, anchor_work, replicas, order, middle) is None:
            low = middle
        else:
            high = middle
    assignments = _fill(num_blocks, anchor_work, replicas, order, high)
    if assignments is None:
        room = sum(replicas[index].max_blocks for index in order)
        raise ValueError(f"{num_blocks} star blocks, and {len(order)} replicas have room for {room:.0f}")
    return assignments


def completion_time(assignment: Assignment, anchor_work: float, replica: ReplicaState) -> float:
    """The work after which a replica is done with its assignment, queued work included."""
    anchor = 0.0 if assignment.first == 0 or replica.has_anchor else anchor_work
    blocks = range(assignment.first, assignment.stop)
    return replica.load + anchor + sum(block not in replica.cached_blocks for block in blocks)


def best_num_replicas(num_blocks: int, anchor_work: float, max_replicas: int) -> int:
    """The smallest number of idle replicas with empty caches that is as fast as ``max_replicas`` of them."""

    def work(number: int) -> float:
        assignments = assign_blocks(num_blocks, anchor_work, [ReplicaState()] * number, number)
        return max(completion_time(assignment, anchor_work, ReplicaState()) for assignment in assignments)

    return min(range(1, min(max_replicas, num_blocks) + 1), key=lambda number: (round(work(number), 6), number))


def _order(num_blocks: int, replicas: Sequence[ReplicaState]) -> list[int]:
    """Replicas in the order in which they get blocks.

    First the one with the most leading blocks cached, less its load. The others follow by where their cached blocks
    begin, then by load.
    """

    def leading(replica: ReplicaState) -> int:
        return next((block for block in range(num_blocks) if block not in replica.cached_blocks), num_blocks)

    by_index = range(len(replicas))
    first = min(
        by_index,
        key=lambda index: (replicas[index].load - leading(replicas[index]), len(replicas[index].cached_blocks), index),
    )
    rest = sorted(
        (index for index in by_index if index != first),
        key=lambda index: (min(replicas[index].cached_blocks, default=num_blocks), replicas[index].load, index),
    )
    return [first, *rest]


def _fill(
    num_blocks: int, anchor_work: float, replicas: Sequence[ReplicaState], order: Sequence[int], until: float
) -> list[Assignment] | None:
    """Give each replica in turn all that it can do by time ``until``; None where blocks are left over."""
    assignments, first = [], 0
    for index in order:
        replica, stop = replicas[index], first
        work = completion_time(Assignment(index, first, first), anchor_work, replica)
        while stop < num_blocks and stop - first < replica.max_blocks:
            work += stop not in replica.cached_blocks
            if work > until:
                break
            stop += 1
        if stop > first:
            assignments.append(Assignment(index, first, stop))
        elif not assignments:
            return None  # the query runs on the replica of the first assignment
        first = stop
    return assignments if first == num_blocks else None
