"""Star blocks over replicas: every block once, in contiguous runs, the last replica done as early as can be."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.spread import Replica, Run, best_number, run_work, spread_blocks

REPLICAS = st.lists(
    st.builds(
        Replica,
        cached=st.frozensets(st.integers(0, 9), max_size=10),
        has_anchor=st.booleans(),
        load=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    ),
    min_size=1,
    max_size=4,
)
ANCHORS = st.sampled_from([0.0, 0.25, 1.0])


def makespan(runs, anchor_work, replicas) -> float:
    return max(run_work(run, anchor_work, replicas[run.replica]) for run in runs)


@given(blocks=st.integers(1, 10), anchor_work=ANCHORS, replicas=REPLICAS, most=st.integers(1, 4))
def test_every_block_is_in_one_contiguous_run_of_its_own_replica(blocks, anchor_work, replicas, most):
    runs = spread_blocks(blocks, anchor_work, replicas, most)
    assert [block for run in runs for block in range(run.first, run.stop)] == list(range(blocks))
    assert len({run.replica for run in runs}) == len(runs) <= most
    assert all(run.stop > run.first for run in runs)


@given(blocks=st.integers(1, 8), anchor_work=ANCHORS, number=st.integers(1, 4))
def test_no_other_contiguous_split_is_faster(blocks, anchor_work, number):
    replicas = [Replica()] * number
    if number > blocks:
        return
    best = min(
        makespan(
            [Run(index, first, stop) for index, (first, stop) in enumerate(pairwise(cuts))],
            anchor_work,
            replicas,
        )
        for inner in combinations_with_replacement(range(1, blocks + 1), number - 1)
        for cuts in [(0, *inner, blocks)]
        if all(first < stop for first, stop in pairwise(cuts))
    )
    found = makespan(spread_blocks(blocks, anchor_work, replicas, number), anchor_work, replicas)
    assert found <= best + 1e-6


@pytest.mark.parametrize("blocks", range(1, 33))
def test_two_replicas_that_both_compute_the_anchor_take_half_and_a_half_block(blocks):
    runs = spread_blocks(blocks, 1.0, [Replica(), Replica()], 2)
    assert makespan(runs, 1.0, [Replica(), Replica()]) == pytest.approx(-(-(blocks + 1) // 2))


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ([Replica(), Replica()], [Run(0, 0, 5), Run(1, 5, 8)]),  # 5 | anchor + 3: 4.5 would be even
        ([Replica(), Replica(has_anchor=True)], [Run(0, 0, 4), Run(1, 4, 8)]),
        ([Replica(load=100), Replica()], [Run(1, 0, 8)]),  # the busy one would be last whatever it gets
        ([Replica(), Replica(frozenset(range(8)), True)], [Run(1, 0, 8)]),  # nothing left to do
        ([Replica(), Replica(frozenset({0, 1}), True)], [Run(1, 0, 6), Run(0, 6, 8)]),
        ([Replica(frozenset({6, 7}), True), Replica()], [Run(1, 0, 3), Run(0, 3, 8)]),
        ([Replica()] * 3, [Run(0, 0, 4), Run(1, 4, 7), Run(2, 7, 8)]),
    ],
)
def test_what_is_cached_and_what_is_queued_counts(replicas, expected):
    assert spread_blocks(8, 1.0, replicas, len(replicas)) == expected


@pytest.mark.parametrize(
    ("blocks", "most", "number"), [(1, 2, 1), (2, 2, 1), (3, 2, 2), (8, 1, 1), (8, 8, 7), (4, 3, 3), (5, 3, 2)]
)
def test_no_more_replicas_than_make_it_faster(blocks, most, number):
    assert best_number(blocks, 1.0, most) == number


def test_nobody_gets_more_than_its_memory_takes():
    """The idle one would get most; where all together have no room it is said."""
    roomy, small = Replica(load=3.0), Replica(room=2)
    assert spread_blocks(10, 1.0, [roomy, small, small], 3) == [Run(1, 0, 2), Run(2, 2, 4), Run(0, 4, 10)]
    with pytest.raises(ValueError, match="10 star blocks, and 3 replicas have room for 6"):
        spread_blocks(10, 1.0, [small] * 3, 3)
