"""Star blocks over replicas: each block once, in contiguous ranges, with the earliest end of the last replica."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.scheduler.planning.assignment import (
    Assignment,
    ReplicaState,
    assign_blocks,
    best_num_replicas,
    best_num_replicas_of,
    completion_time,
    replicas_needed,
)


def flags(cached: Iterable[int], num_blocks: int = 10) -> bytes:
    """The flags of ReplicaState for the cached blocks."""
    return bytes(block in cached for block in range(num_blocks))


def replica_states(num_blocks: int, **more: st.SearchStrategy) -> st.SearchStrategy[list[ReplicaState]]:
    replica = st.builds(
        ReplicaState,
        cached=st.lists(st.sampled_from([0, 1]), max_size=num_blocks).map(bytes),
        has_anchor=st.booleans(),
        load=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
        **more,
    )
    return st.lists(replica, min_size=1, max_size=4)


ANCHORS = st.sampled_from([0.0, 0.25, 1.0])
SIZES = st.one_of(
    st.integers(1, 14).map(np.ones),
    st.lists(st.sampled_from([0.125, 0.5, 0.75, 1.0]), min_size=1, max_size=14).map(np.array),
)
"""The sizes of equal blocks, and of documents."""


def makespan(sizes, assignments, anchor_work, replicas) -> float:
    """The time at which the last replica is done."""
    return max(completion_time(sizes, each, anchor_work, replicas[each.replica]) for each in assignments)


@given(data=st.data(), sizes=SIZES, anchor_work=ANCHORS, max_replicas=st.integers(1, 4))
def test_each_replica_gets_one_contiguous_range_and_each_block_is_in_one(data, sizes, anchor_work, max_replicas):
    replicas = data.draw(replica_states(len(sizes)))
    assignments = assign_blocks(sizes, anchor_work, replicas, max_replicas)
    assert [block for each in assignments for block in range(each.first, each.stop)] == list(range(len(sizes)))
    assert len({each.replica for each in assignments}) == len(assignments) <= max_replicas
    assert all(each.stop > each.first for each in assignments)


@given(sizes=SIZES, anchor_work=ANCHORS, number=st.integers(1, 4))
def test_no_other_contiguous_split_is_faster(sizes, anchor_work, number):
    sizes = sizes[:8]
    replicas, blocks = [ReplicaState()] * number, len(sizes)
    if number > blocks:
        return
    best = min(
        makespan(
            sizes,
            [Assignment(index, first, stop) for index, (first, stop) in enumerate(pairwise(cuts))],
            anchor_work,
            replicas,
        )
        for inner in combinations_with_replacement(range(1, blocks + 1), number - 1)
        for cuts in [(0, *inner, blocks)]
        if all(first < stop for first, stop in pairwise(cuts))
    )
    found = makespan(sizes, assign_blocks(sizes, anchor_work, replicas, number), anchor_work, replicas)
    assert found <= best + 1e-6


def plain_assignments(sizes, anchor_work, replicas, max_replicas) -> list[Assignment] | None:
    """What assign_blocks searches for, by a look at each block; None where the replicas have no room."""
    num_blocks = len(sizes)

    def first_block(replica: ReplicaState, cached: bool) -> int:
        padded = replica.cached.ljust(num_blocks, b"\0")
        return next((block for block in range(num_blocks) if padded[block] == cached), num_blocks)

    def work(replica: ReplicaState, first: int, stop: int) -> float:
        anchor = 0.0 if first == 0 or replica.has_anchor else anchor_work
        uncached = [block for block in range(first, stop) if not any(replica.cached[block : block + 1])]
        return replica.load + anchor + sum(sizes[uncached])

    def fill(until: float) -> list[Assignment] | None:
        assignments, first = [], 0
        for index in order:
            replica, stop = replicas[index], first
            while (
                stop < num_blocks
                and sum(sizes[first : stop + 1]) <= replica.max_blocks
                and work(replica, first, stop) <= until
                and work(replica, first, stop + 1) <= until
            ):
                stop += 1
            if stop > first:
                assignments.append(Assignment(index, first, stop))
            elif not assignments:
                return None
            first = stop
        return assignments if first == num_blocks else None

    def rank(index: int) -> tuple:
        replica = replicas[index]
        return replica.load - sum(sizes[: first_block(replica, False)]), sum(replica.cached), index

    first = min(range(len(replicas)), key=rank)
    rest = (index for index in range(len(replicas)) if index != first)
    key = lambda index: (first_block(replicas[index], True), replicas[index].load, index)  # noqa: E731
    order = [first, *sorted(rest, key=key)][:max_replicas]
    # Replicas end after their load, the anchor or none, and some blocks.
    ends = {
        work(each, first, stop) + anchor
        for each in replicas
        for anchor in (0, anchor_work)
        for first in range(num_blocks)
        for stop in range(first, num_blocks + 1)
    }
    return next((found for until in sorted(ends) if (found := fill(until)) is not None), None)


@settings(max_examples=300)
@given(data=st.data(), sizes=SIZES, anchor_work=ANCHORS, max_replicas=st.integers(1, 4))
def test_assignments_are_those_of_a_look_at_each_block(data, sizes, anchor_work, max_replicas):
    replicas = data.draw(replica_states(len(sizes), max_blocks=st.sampled_from([0, 1, 2, 5, math.inf])))
    expected = plain_assignments(sizes, anchor_work, replicas, max_replicas)
    if expected is None:
        with pytest.raises(ValueError, match="have room for"):
            assign_blocks(sizes, anchor_work, replicas, max_replicas)
    else:
        assert assign_blocks(sizes, anchor_work, replicas, max_replicas) == expected


def work_of(sizes, anchor_work: float, number: int) -> float:
    """The time that so many idle replicas take."""
    idle = [ReplicaState()] * number
    return makespan(sizes, assign_blocks(sizes, anchor_work, idle, number), anchor_work, idle)


@given(st.integers(1, 60), st.sampled_from([0.0, 0.001, 0.25, 0.5, 1.0]), st.integers(1, 12))
def test_the_best_number_of_replicas_is_that_of_the_assignments(blocks, anchor_work, max_replicas):
    numbers = range(1, min(max_replicas, blocks) + 1)
    work = {number: round(work_of(np.ones(blocks), anchor_work, number), 6) for number in numbers}
    assert best_num_replicas(blocks, anchor_work, max_replicas) == min(
        numbers, key=lambda number: (work[number], number)
    )


@given(SIZES, ANCHORS, st.integers(1, 12))
def test_as_many_replicas_are_used_as_are_worth_it(sizes, anchor_work, max_replicas):
    numbers = range(1, min(max_replicas, len(sizes)) + 1)
    work = [work_of(sizes, anchor_work, number) for number in numbers]
    expected = next(number for number, one in zip(numbers, work, strict=True) if one <= 1.05 * work[-1])
    assert best_num_replicas_of(sizes, anchor_work, max_replicas) == expected


def test_a_document_behind_a_short_head_stays_on_one_replica():
    assert best_num_replicas_of(np.array([0.0156, 0.969]), 0.0, 2) == 1


@given(st.lists(st.integers(1, 96), min_size=1, max_size=20), st.sampled_from([0.0, 0.3, 7.7]))
def test_one_replica_takes_all_blocks_whatever_its_load(pages, load):
    """Sums of sizes that are no powers of two round."""
    sizes = np.array(pages) / 96
    assert assign_blocks(sizes, 0.0, [ReplicaState(load=load)], 1) == [Assignment(0, 0, len(pages))]
    assert replicas_needed(sizes, sum(pages) / 96, 1) == 1


@pytest.mark.parametrize("blocks", range(1, 33))
def test_two_replicas_that_both_compute_the_anchor_take_half_the_blocks_and_the_anchor(blocks):
    sizes = np.ones(blocks)
    assignments = assign_blocks(sizes, 1.0, [ReplicaState(), ReplicaState()], 2)
    assert makespan(sizes, assignments, 1.0, [ReplicaState(), ReplicaState()]) == pytest.approx(-(-(blocks + 1) // 2))


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        # 5 blocks, and the anchor and 3 blocks.
        ([ReplicaState(), ReplicaState()], [Assignment(0, 0, 5), Assignment(1, 5, 8)]),
        ([ReplicaState(), ReplicaState(has_anchor=True)], [Assignment(0, 0, 4), Assignment(1, 4, 8)]),
        # With any block, the busy replica would be the last.
        ([ReplicaState(load=100), ReplicaState()], [Assignment(1, 0, 8)]),
        # All blocks are cached.
        ([ReplicaState(), ReplicaState(bytes([1] * 8), True)], [Assignment(1, 0, 8)]),
        ([ReplicaState(), ReplicaState(bytes([1, 1]), True)], [Assignment(1, 0, 6), Assignment(0, 6, 8)]),
        ([ReplicaState(flags({6, 7}, 8), True), ReplicaState()], [Assignment(1, 0, 3), Assignment(0, 3, 8)]),
        ([ReplicaState()] * 3, [Assignment(0, 0, 4), Assignment(1, 4, 7), Assignment(2, 7, 8)]),
    ],
)
def test_assignments_depend_on_cached_blocks_and_queued_work(replicas, expected):
    assert assign_blocks(np.ones(8), 1.0, replicas, len(replicas)) == expected


@pytest.mark.parametrize(
    ("blocks", "max_replicas", "number"), [(1, 2, 1), (2, 2, 1), (3, 2, 2), (8, 1, 1), (8, 8, 7), (4, 3, 3), (5, 3, 2)]
)
def test_the_best_number_of_replicas_is_the_smallest_that_is_as_fast(blocks, max_replicas, number):
    assert best_num_replicas(blocks, 1.0, max_replicas) == number


def test_unequal_blocks_need_no_more_replicas_than_make_them_faster():
    """One document is nearly all of the prompt."""
    sizes = np.array([0.1, 1.0, 0.1, 0.1])
    assert best_num_replicas_of(sizes, 0.1, 4) == 2
    assert assign_blocks(sizes, 0.1, [ReplicaState()] * 2, 2) == [Assignment(0, 0, 2), Assignment(1, 2, 4)]


@given(sizes=SIZES, room=st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.5, 30.0]), max_replicas=st.integers(1, 5))
def test_the_fewest_replicas_with_room_are_those_that_an_assignment_needs(sizes, room, max_replicas):
    def fits(number: int) -> bool:
        try:
            assign_blocks(sizes, 0.0, [ReplicaState(max_blocks=room)] * number, number)
        except ValueError:
            return False
        return True

    expected = next((number for number in range(1, max_replicas + 1) if fits(number)), None)
    assert replicas_needed(sizes, room, max_replicas) == expected


def test_no_replica_gets_more_blocks_than_its_memory_takes():
    """Without the limit the idle replicas would get more. If all replicas together have no room, an error says so."""
    roomy, small = ReplicaState(load=3.0), ReplicaState(max_blocks=2)
    assert assign_blocks(np.ones(10), 1.0, [roomy, small, small], 3) == [
        Assignment(1, 0, 2),
        Assignment(2, 2, 4),
        Assignment(0, 4, 10),
    ]
    with pytest.raises(ValueError, match="10 star blocks, and 3 replicas have room for 6"):
        assign_blocks(np.ones(10), 1.0, [small] * 3, 3)
