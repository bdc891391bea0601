"""Rows by kinds of heads: each head of each token is computed by one row, with the keys that its plan gives it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.attention_backends.star.head_step import HeadStep, head_runs
from starling.attention_backends.star.step import StarStep, open_step
from starling.lab.selftest.masks import head_masks
from starling.scheduler.planning.plan import DenseHeads, StarPlan
from tests.unit.attention_backends.test_rows import batch_metadata
from tests.unit.attention_backends.test_step import make_builder
from tests.unit.masks import mask_of

PAGE = 4
RANKS = np.array([3, 0, 5, 1, 4, 2])
"""The places of a layer's six heads in the order of scores."""


def plan_with(count: int | None) -> StarPlan:
    heads = None if count is None else DenseHeads(count, 12, "digest")
    return StarPlan(8, 4, 4, 30, 40, dense_heads=heads)


def built(plans: dict[str, StarPlan], query_lens: list[int], seq_lens: list[int], layer="layer"):
    """What a layer reads of a step."""
    names = [f"r{number}" for number in range(len(query_lens))]
    scheduled = dict(zip(names, query_lens, strict=True))
    step = StarStep(
        plans,
        scheduled,
        lambda: names,
        lambda rows: None,
        heads=HeadStep(plans.values(), {"layer": RANKS, "star": RANKS + 12}),
    )
    with open_step(step):
        make_builder().build(0, batch_metadata(query_lens, seq_lens, columns=12))
        _ = step.heads.row_heads("layer")
        return step.heads.row_heads(layer)


@given(st.lists(st.tuples(st.sampled_from([None, 0, 1, 3, 6]), st.integers(1, 40)), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_each_head_of_each_token_sees_the_keys_of_its_mask(requests, data):
    """By the pages of the rows: key k of request r is in page r * 12 + k // 4 of the fake block table."""
    ends = [end for _, end in requests]
    starts = [data.draw(st.integers(0, end - 1)) for end in ends]
    plans = {f"r{i}": plan_with(count or None) for i, (count, _) in enumerate(requests) if count != 0}
    if not any(plan.dense_heads for plan in plans.values()):
        plans["r0"] = plan_with(3)
    query_lens = [end - start for start, end in zip(starts, ends, strict=True)]
    layer = built(plans, query_lens, ends)
    if layer is None:  # no row of the step is split
        assert all(start >= 30 for i, start in enumerate(starts) if f"r{i}" in plans)
        return
    rows, row_heads = layer
    common = batch_metadata(query_lens, ends, columns=12)
    tokens, bounds = sum(query_lens), rows.query_start_loc.tolist()
    seen = torch.zeros(len(RANKS), tokens, len(ends), 48, dtype=torch.bool)
    computed = torch.zeros(len(RANKS), tokens, dtype=torch.int64)
    place = {int(page): (r, c) for r, row in enumerate(common.block_table_tensor) for c, page in enumerate(row)}
    for row, (first, last) in enumerate(pairwise(bounds)):
        length = int(rows.seq_lens[row])
        for token in range(first, last):
            keys = length - (last - 1 - token)
            for head in torch.nonzero(row_heads[row])[:, 0].tolist():
                computed[head, token % tokens] += 1
                for key in range(keys):
                    request, column = place[int(rows.block_table[row, key // PAGE])]
                    seen[head, token % tokens, request, column * PAGE + key % PAGE] = True
    assert (computed == 1).all()
    at = np.cumsum([0, *query_lens])
    for request, (start, end) in enumerate(zip(starts, ends, strict=True)):
        plan = plans.get(f"r{request}")
        star = torch.ones(end, end, dtype=torch.bool).tril() if plan is None else mask_of(plan, end)
        count = plan.dense_heads.count if plan and plan.dense_heads else 0
        expected = head_masks(star, len(RANKS), set(np.flatnonzero(count > RANKS).tolist()))
        got = seen[:, at[request] : at[request + 1]]
        assert torch.equal(got[:, :, request, :end], expected[:, start:end])
        assert got.sum() == expected[:, start:end].sum()  # none of another request


def test_a_layer_without_dense_heads_has_the_rows_of_all_layers():
    layer = built({"r0": plan_with(3)}, [20], [20], layer="star")
    assert layer is None


def test_dense_heads_that_no_layer_reads_are_an_error():
    step = StarStep(
        {"r0": plan_with(3)},
        {"r0": 20},
        lambda: ["r0"],
        lambda rows: None,
        heads=HeadStep([plan_with(3)], {"layer": RANKS}),
    )
    with pytest.raises(RuntimeError, match="dense heads ran, but no layer took them"), open_step(step):
        make_builder().build(0, batch_metadata([20], [20], columns=12))


@given(st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True), st.sets(st.integers(1, 12), min_size=1))
def test_runs_are_as_few_as_heads_of_other_kinds_allow(ranks, counts):
    """Two heads are of one kind where they are dense for the same plans."""
    runs = head_runs(sorted(counts), np.array(ranks))
    dense_for = [frozenset(count for count in counts if rank < count) for rank in ranks]
    if not any(dense_for):
        assert runs is None
        return
    found = [run.kind for run in runs for _ in range(run.first, run.stop)]
    assert len(found) == len(ranks) and runs[0].first == 0
    assert all(before.stop == after.first for before, after in pairwise(runs))
    assert len(runs) == 1 + sum(before != after for before, after in pairwise(dense_for))
    assert found == [len(counts) - len(dense) for dense in dense_for]
