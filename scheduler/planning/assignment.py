"""Assignment of one prompt's star blocks to replicas. Pure functions; work is counted in blocks of B tokens.

Phase 1 of Star Attention needs nothing of other blocks but the anchor (arXiv 2411.17116, section 2.1), so any replica
may prefill any block. Each replica gets one contiguous range of blocks. The replica of the first range computes
block 0, and with it the anchor; every other replica computes the anchor once more or finds it in its prefix cache. The
query also runs on the replica of the first range: that range is the longest, so the fewest pages have to move.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from starling.config.parsing import OptionError
from starling.config.star import flat_name
from starling.scheduler.planning.plan import StarPlan, block_range, work


@dataclass(frozen=True)
class KVDemand:
    """The pages that one prompt takes on each replica.

    Attributes:
        page_size: tokens of a page.
        capacity: replica -> its pages.
    """

    plan: StarPlan
    page_size: int
    capacity: Mapping[int, int]

    def max_blocks(self, replica: int) -> float:
        """Blocks of B tokens that a replica can hold beside the anchor's copy, or the query and a token of output."""
        beside = max(self.plan.anchor_size // self.page_size, self._tail_pages(1))
        return max((self.capacity[replica] - beside) * self.page_size / self.plan.block_size, 0.0)

    def pages_of(self, assignments: Sequence[Assignment], params: Any) -> dict[int, int]:
        """Pages that a prompt with these assignments takes on each replica, at most all the pages of the replica.

        The replica of the first assignment also holds the query, and the output of each choice. Where it fetches the
        other replicas' pages it holds these too; the output then needs no reservation, since the other replicas have
        released their pages by then.

        Args:
            params: the request's sampling parameters.
        """
        num_pages: dict[int, int] = {}
        for number, assignment in enumerate(assignments):
            start, stop = block_range(self.plan, assignment.first, assignment.stop)
            tokens = stop - start
            if number:
                beside = self.plan.anchor_size // self.page_size
            elif self.plan.shards:
                beside = params.n * self._tail_pages(params.max_tokens)
            else:
                tokens, beside = self.plan.context_end, self._tail_pages(0)
            wanted = -(-tokens // self.page_size) + beside
            num_pages[assignment.replica] = min(wanted, self.capacity[assignment.replica])
        return num_pages

    def _tail_pages(self, output_tokens: int | None) -> int:
        """Pages of the query and the output; all pages of a replica where the length of the output is unknown."""
        if output_tokens is None:
            return max(self.capacity.values())
        return -(-(self.plan.num_prompt_tokens - self.plan.context_end + output_tokens) // self.page_size) + 1


def with_enough_replicas(plan: StarPlan, page_size: int, num_pages: int, max_replicas: int) -> StarPlan:
    """Return the plan with as many replicas as its KV needs.

    Args:
        page_size: tokens of a page.
        num_pages: of each replica.

    Raises:
        OptionError: ``max_replicas`` are not enough.
    """
    room = KVDemand(plan, page_size, {0: num_pages}).max_blocks(0)
    needed = replicas_needed(work(plan), room, max_replicas)
    if needed is None:
        reason = (
            f"{work(plan).sum():g} star blocks of {plan.block_size} tokens, anchor and query need more KV memory "
            f"than {max_replicas} replicas of {num_pages} pages of {page_size} tokens have"
        )
        raise OptionError(flat_name("shards"), "on", reason, "a shorter prompt, smaller blocks, or more memory")
    return replace(plan, replicas=max(plan.replicas, needed))


BISECTIONS = 32
ROUNDING = 1e-9
"""Sums of sizes are compared with this tolerance; a token of the longest block is far more."""

WORTH = 1.05
"""With blocks of any sizes, more replicas are used only if they make the prompt faster by such a factor in all."""


@dataclass(frozen=True)
class ReplicaState:
    """A replica before it starts on a prompt.

    Attributes:
        cached: a byte for each star block of the prompt, 1 where all its pages are in the prefix cache; blocks behind
            the last byte are not cached.
        has_anchor: whether the pages of the anchor are.
        load: work that is queued there already.
        max_blocks: blocks of B tokens that its memory takes.
    """

    cached: bytes = b""
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
    sizes: np.ndarray,
    anchor_work: float,
    replicas: Sequence[ReplicaState],
    max_replicas: int,
) -> list[Assignment]:
    """Split blocks over at most ``max_replicas`` replicas, so that the last replica is done as early as possible.

    Args:
        sizes: (N,) float64, the work of each star block, 1 for B tokens; N is at least 1.
        anchor_work: the work of computing the anchor, A / B.
        replicas: all replicas, by index.

    Returns:
        Assignments in the order of their blocks, none empty; the first one's replica runs the query.

    Raises:
        ValueError: the replicas' memory does not take all blocks.
    """
    before = _sums(sizes)
    order = _order(before, replicas)[:max_replicas]
    uncached = {index: _uncached_before(sizes, replicas[index]) for index in order}
    low, high = 0.0, max(replica.load for replica in replicas) + float(before[-1]) + anchor_work
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _fill(before, anchor_work, replicas, uncached, middle) is None:
            low = middle
        else:
            high = middle
    assignments = _fill(before, anchor_work, replicas, uncached, high)
    if assignments is None:
        room = sum(replicas[index].max_blocks for index in order)
        raise ValueError(f"{before[-1]:g} star blocks, and {len(order)} replicas have room for {room:.0f}")
    return assignments


def completion_time(sizes: np.ndarray, assignment: Assignment, anchor_work: float, replica: ReplicaState) -> float:
    """Return the work after which a replica is done with its assignment, queued work included.

    Args:
        sizes: as ``assign_blocks`` has them.
    """
    before = _uncached_before(sizes, replica)
    return _start(assignment.first, anchor_work, replica) + float(before[assignment.stop] - before[assignment.first])


def best_num_replicas(num_blocks: int, anchor_work: float, max_replicas: int) -> int:
    """Return the fewest idle replicas with empty caches that are as fast as ``max_replicas`` of them.

    Args:
        num_blocks: star blocks of the prompt, which all have B tokens.
    """

    def work(number: int) -> float:
        # All replicas are done after a whole number of blocks, or after the anchor and a whole number of blocks.
        even = -(-(num_blocks + (number - 1) * math.ceil(anchor_work)) // number)
        behind_anchor = max(-(-(num_blocks - math.floor(anchor_work)) // number), 0)
        return min(num_blocks, even, behind_anchor + anchor_work)

    return min(range(1, min(max_replicas, num_blocks) + 1), key=lambda number: (round(work(number), 6), number))


def best_num_replicas_of(sizes: np.ndarray, anchor_work: float, max_replicas: int) -> int:
    """As ``best_num_replicas``, for blocks of any sizes: the smallest number that is within 5 % of the fastest."""

    def work(number: int) -> float:
        assignments = assign_blocks(sizes, anchor_work, [ReplicaState()] * number, number)
        return max(completion_time(sizes, each, anchor_work, ReplicaState()) for each in assignments)

    limit = min(max_replicas, len(sizes))
    enough = WORTH * work(limit)
    # More replicas never take longer, so the numbers that are enough are the last ones.
    return bisect_left(range(1, limit + 1), True, key=lambda number: work(number) <= enough) + 1


def replicas_needed(sizes: np.ndarray, room: float, max_replicas: int) -> int | None:
    """Return the fewest replicas whose memory takes all blocks in contiguous ranges, or None if more are needed.

    Args:
        room: blocks of B tokens that one replica's memory takes.
    """
    before, first = _sums(sizes), 0
    for number in range(1, max_replicas + 1):
        first = int(np.searchsorted(before, before[first] + room + ROUNDING, side="right")) - 1
        if first == len(sizes):
            return number
    return None


def _start(first: int, anchor_work: float, replica: ReplicaState) -> float:
    """Return the work after which a replica begins with a range of blocks."""
    return replica.load + (0.0 if first == 0 or replica.has_anchor else anchor_work)


def _sums(sizes: np.ndarray) -> np.ndarray:
    """(N + 1,) float64: the sum of the sizes before each one."""
    return np.concatenate(([0.0], np.cumsum(sizes)))


def _order(before: np.ndarray, replicas: Sequence[ReplicaState]) -> list[int]:
    """Replicas in the order in which they get blocks.

    First the one with the most leading work cached, less its load. The others follow by where their cached blocks
    begin, then by load.

    Args:
        before: the work before each block.
    """
    num_blocks = len(before) - 1

    def first_block(replica: ReplicaState, flag: int) -> int:
        """Return the first block that is cached (1), or is not (0)."""
        found = replica.cached.find(flag)
        if found >= 0:
            return found
        return num_blocks if flag else len(replica.cached)

    by_index = range(len(replicas))
    first = min(
        by_index,
        key=lambda index: (
            replicas[index].load - before[first_block(replicas[index], 0)],
            replicas[index].cached.count(1),
            index,
        ),
    )
    rest = sorted(
        (index for index in by_index if index != first),
        key=lambda index: (first_block(replicas[index], 1), replicas[index].load, index),
    )
    return [first, *rest]


def _uncached_before(sizes: np.ndarray, replica: ReplicaState) -> np.ndarray:
    """(N + 1,) float64: how much work before each block is not cached."""
    flags = np.frombuffer(replica.cached.ljust(len(sizes), b"\0"), dtype=np.uint8)
    return _sums(sizes * (1 - flags))


def _fill(
    before: np.ndarray,
    anchor_work: float,
    replicas: Sequence[ReplicaState],
    uncached: Mapping[int, np.ndarray],
    until: float,
) -> list[Assignment] | None:
    """Give each replica in turn all that it can do by time ``until``; None where blocks are left over.

    Args:
        before: the work before each block.
        uncached: replica -> its _uncached_before, in the order in which the replicas get blocks.
    """
    assignments, first = [], 0
    for index, to_do in uncached.items():
        replica, stop = replicas[index], first
        left = until - _start(first, anchor_work, replica)
        if left >= 0:
            in_time = np.searchsorted(to_do, to_do[first] + left + ROUNDING, side="right")
            in_memory = np.searchsorted(before, before[first] + replica.max_blocks + ROUNDING, side="right")
            stop = int(min(in_time, in_memory)) - 1
        if stop > first:
            assignments.append(Assignment(index, first, stop))
        elif not assignments:
            return None  # the query runs on the replica of the first assignment
        first = stop
    return assignments if first == len(before) - 1 else None
