"""How many KV pages a split prompt takes on each replica."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from starling.config.parsing import OptionError
from starling.scheduler.planning.assignment import Assignment, KVDemand, with_enough_replicas
from starling.scheduler.planning.plan import StarPlan

PAGE_SIZE = 32
PLAN = StarPlan(64, 64, 0, 500, 520, 2)
"""8 blocks of 2 pages, the last one of 52 tokens."""

SHARDED = StarPlan(64, 64, 0, 500, 520, 2, True)


def test_pages_of_a_prompt_on_each_replica():
    demand = KVDemand(SHARDED, PAGE_SIZE, {0: 100, 1: 12})
    assignments = [Assignment(0, 0, 5), Assignment(1, 5, 8)]
    assert demand.pages_of(assignments, SimpleNamespace(n=2, max_tokens=30)) == {0: 10 + 2 * (2 + 1), 1: 6 + 2}
    assert demand.pages_of(assignments, SimpleNamespace(n=1, max_tokens=None)) == {0: 100, 1: 8}
    assert (demand.max_blocks(0), demand.max_blocks(1)) == (49, 5)  # beside the anchor's 2 pages, or the query's
    fetching = KVDemand(PLAN, PAGE_SIZE, {0: 100, 1: 12})
    assert fetching.pages_of(assignments, SimpleNamespace(n=2, max_tokens=30)) == {0: 16 + 2, 1: 6 + 2}


def test_a_plan_gets_as_many_replicas_as_its_kv_needs():
    assert with_enough_replicas(SHARDED, PAGE_SIZE, 100, 3).replicas == 2
    assert with_enough_replicas(SHARDED, PAGE_SIZE, 8, 3).replicas == 3  # 3 blocks in each
    with pytest.raises(OptionError, match=r"star_shards='on' is refused: 8 star blocks .* than 2 replicas of 8 pages"):
        with_enough_replicas(SHARDED, PAGE_SIZE, 8, 2)
    with pytest.raises(OptionError, match="than 3 replicas of 2 pages"):
        with_enough_replicas(SHARDED, PAGE_SIZE, 2, 3)
