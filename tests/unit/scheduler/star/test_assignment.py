"""Star blocks over replicas: each block once, in contiguous ranges, with the earliest end of the last replica."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.star.assignment import Assignment, ReplicaState, assign_blocks, best_num_replicas, completion_time

REPLICAS = st.lists(
    st.builds(
        ReplicaState,
        cached_blocks=st.frozensets(st.integers(0, 9), max_size=10),
        has_anchor=st.booleans(),
        load=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    ),
    min_size=1,
    max_size=4,
)
ANCHORS = st.sampled_from([0.0, 0.25, 1.0])


def makespan(assignments, anchor_work, replicas) -> float:
    """The time at which the last replica is done."""
    return max(completion_time(each, anchor_work, replicas[each.replica]) for each in assignments)


@given(blocks=st.integers(1, 10), anchor_work=ANCHORS, replicas=REPLICAS, max_replicas=st.integers(1, 4))
def test_each_replica_gets_one_contiguous_range_and_each_block_is_in_one(blocks, anchor_work, replicas, max_replicas):
    assignments = assign_blocks(blocks, anchor_work, replicas, max_replicas)
    assert [block for each in assignments for block in range(each.first, each.stop)] == list(range(blocks))
    assert len({each.replica for each in assignments}) == len(assignments) <= max_replicas
    assert all(each.stop > each.first for each in assignments)


@given(blocks=st.integers(1, 8), anchor_work=ANCHORS, number=st.integers(1, 4))
def test_no_other_contiguous_split_is_faster(blocks, anchor_work, number):
    replicas = [ReplicaState()] * number
    if number > blocks:
        return
    best = min(
        makespan(
            [Assignment(index, first, stop) for index, (first, stop) in enumerate(pairwise(cuts))],
            anchor_work,
            replicas,
        )
        for inner in combinations_with_replacement(range(1, blocks + 1), number - 1)
        for cuts in [(0, *inner, blocks)]
        if all(first < stop for first, stop in pairwise(cuts))
    )
    found = makespan(assign_blocks(blocks, anchor_work, replicas, number), anchor_work, replicas)
    assert found <= best + 1e-6


@pytest.mark.parametrize("blocks", range(1, 33))
def test_two_replicas_that_both_compute_the_anchor_take_half_the_blocks_and_the_anchor(blocks):
    assignments = assign_blocks(blocks, 1.0, [ReplicaState(), ReplicaState()], 2)
    assert makespan(assignments, 1.0, [ReplicaState(), ReplicaState()]) == pytest.approx(-(-(blocks + 1) // 2))


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        # 5 blocks, and the anchor and 3 blocks.
        ([ReplicaState(), ReplicaState()], [Assignment(0, 0, 5), Assignment(1, 5, 8)]),
        ([ReplicaState(), ReplicaState(has_anchor=True)], [Assignment(0, 0, 4), Assignment(1, 4, 8)]),
        # With any block, the busy replica would be the last.
        ([ReplicaState(load=100), ReplicaState()], [Assignment(1, 0, 8)]),
        # All blocks are cached.
        ([ReplicaState(), ReplicaState(frozenset(range(8)), True)], [Assignment(1, 0, 8)]),
        ([ReplicaState(), ReplicaState(frozenset({0, 1}), True)], [Assignment(1, 0, 6), Assignment(0, 6, 8)]),
        ([ReplicaState(frozenset({6, 7}), True), ReplicaState()], [Assignment(1, 0, 3), Assignment(0, 3, 8)]),
        ([ReplicaState()] * 3, [Assignment(0, 0, 4), Assignment(1, 4, 7), Assignment(2, 7, 8)]),
    ],
)
def test_assignments_depend_on_cached_blocks_and_queued_work(replicas, expected):
    assert assign_blocks(8, 1.0, replicas, len(replicas)) == expected


@pytest.mark.parametrize(
    ("blocks", "max_replicas", "number"), [(1, 2, 1), (2, 2, 1), (3, 2, 2), (8, 1, 1), (8, 8, 7), (4, 3, 3), (5, 3, 2)]
)
def test_the_best_number_of_replicas_is_the_smallest_that_is_as_fast(blocks, max_replicas, number):
    assert best_num_replicas(blocks, 1.0, max_replicas) == number


def test_no_replica_gets_more_blocks_than_its_memory_takes():
    """Without the limit the idle replicas would get more. If all replicas together have no room, an error says so."""
    roomy, small = ReplicaState(load=3.0), ReplicaState(max_blocks=2)
    assert assign_blocks(10, 1.0, [roomy, small, small], 3) == [
        Assignment(1, 0, 2),
        Assignment(2, 2, 4),
        Assignment(0, 4, 10),
    ]
    with pytest.raises(ValueError, match="10 star blocks, and 3 replicas have room for 6"):
        assign_blocks(10, 1.0, [small] * 3, 3)
