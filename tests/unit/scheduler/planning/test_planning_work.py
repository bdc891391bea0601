"""The front plans on its event loop: the work must not grow with the number of star blocks of a prompt."""

from __future__ import annotations

import pytest

from starling.attention_backends.attamba.chunks import prompt_keys
from starling.config.star import StarOptions, parse_options
from starling.scheduler.planning.assignment import ReplicaState, assign_blocks
from starling.scheduler.planning.facts import ReplicaSet
from starling.scheduler.planning.plan import summary, work
from tests.unit.lines_run import lines_run
from tests.unit.plans import make_plan

MANY = {"mode": "on", "block_size": 16, "anchor_size": 16}
TOKENS = 1_000_000
PLAN = make_plan(TOKENS, StarOptions(), parse_options(MANY, flat=False), 16)
BLOCKS = len(PLAN.starts)


def test_a_plan_for_many_replicas_is_made_without_a_look_at_each_block():
    options = parse_options(MANY, flat=False)
    work = lines_run(lambda: make_plan(TOKENS, StarOptions(), options, 16, ReplicaSet(8)))
    assert BLOCKS == 62468
    assert work < 1000


def test_the_attended_keys_are_counted_without_a_look_at_each_block():
    assert lines_run(lambda: summary(PLAN)) < 200


def test_the_attended_keys_of_attamba_are_counted_without_a_look_at_each_block():
    shape = {"chunk_size": 1, "window": 8, "layers": 1}
    assert lines_run(lambda: prompt_keys(PLAN, TOKENS, **shape)) < 200


@pytest.mark.parametrize("cached", ["none", "all", "every_second"])
def test_blocks_are_assigned_without_a_look_at_each_block(cached):
    flags = {"none": b"", "all": bytes([1] * BLOCKS), "every_second": bytes([0, 1] * (BLOCKS // 2))}[cached]
    replicas = [ReplicaState(flags, bool(flags), load=index, max_blocks=BLOCKS) for index in range(8)]
    assert lines_run(lambda: assign_blocks(work(PLAN), 1.0, replicas, 8)) < 10_000
