"""The plan of documents, against the prompt's tokens looked at one by one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.scheduler.planning.documents import lay_out
from starling.scheduler.planning.plan import (
    StarPlan,
    blocks_done,
    client_index,
    client_indexes,
    context_pairs,
    keys_attended,
    num_client_tokens,
    pad,
    summary,
)
from starling.scheduler.planning.request_metadata import RequestMetadata

PAGE_SIZE, PAD, QUERY = 4, 9, -1


@dataclass(frozen=True)
class Slot:
    """One slot of the padded prompt.

    Attributes:
        block: number of its block, or QUERY.
        place: its place in the block, or in the query.
        token: its place in the client's prompt; None for padding.
    """

    block: int
    place: int
    token: int | None


@dataclass(frozen=True)
class Layout:
    """A plan, and its slots written out."""

    lengths: list[int]  # of the blocks, the head first
    anchor_size: int
    query: int

    @cached_property
    def plan(self) -> StarPlan:
        ends = np.cumsum([0, *self.lengths]).tolist()
        blocks, context_end = lay_out(list(pairwise(ends)), PAGE_SIZE)
        size = max(PAGE_SIZE, *self.lengths)
        sizes = (size, self.anchor_size, 0, context_end, context_end + self.query)
        return StarPlan(*sizes, documents=blocks[self.first :], padding_token=PAD)

    @property
    def first(self) -> int:
        """The slots' number of the plan's first block: 1 where the head is empty."""
        return int(not self.lengths[0])

    @cached_property
    def slots(self) -> list[Slot]:
        slots: list[Slot] = []
        token = 0
        for block, length in enumerate(self.lengths):
            for place in range(-(-length // PAGE_SIZE) * PAGE_SIZE):
                slots.append(Slot(block, place, token if place < length else None))
                token += place < length
        return slots + [Slot(QUERY, place, token + place) for place in range(self.query)]

    @property
    def client_tokens(self) -> int:
        return sum(self.lengths) + self.query

    def sees(self, query: int, key: int) -> bool:
        """Whether the slot ``query`` sees the slot ``key``; that of padding counts too."""
        own, other = self.slots[query], self.slots[key]
        if key > query:
            return False
        if own.block == QUERY:
            return other.token is not None
        return other.block == own.block or key < self.anchor_size


@st.composite
def layouts(draw):
    head = draw(st.integers(0, 13))
    anchor = PAGE_SIZE * draw(st.integers(0, head // PAGE_SIZE))
    others = draw(st.lists(st.integers(1, 11), min_size=1 if head else 2, max_size=5))
    return Layout([head, *others], anchor, draw(st.integers(1, 6)))


@given(layouts())
def test_padding_fills_the_pages_of_blocks_and_leaves_the_client_tokens_in_order(layout):
    plan, slots = layout.plan, layout.slots
    ids = list(range(100, 100 + layout.client_tokens))
    assert pad(plan, ids) == [PAD if slot.token is None else ids[slot.token] for slot in slots]
    assert len(slots) == plan.num_prompt_tokens and num_client_tokens(plan) == len(ids)
    assert client_indexes(plan).tolist() == [index for index, slot in enumerate(slots) if slot.token is not None]
    before = np.cumsum([0, *(slot.token is not None for slot in slots)])
    assert [client_index(plan, index) for index in range(len(slots) + 1)] == before.tolist()
    assert plan.client_starts[-1] == before[plan.context_end] == client_index(plan, plan.context_end)


@given(layouts(), st.data())
def test_blocks_count_positions_from_the_anchor_and_the_query_counts_the_client_tokens(layout, data):
    plan, slots = layout.plan, layout.slots
    end = len(slots) + 3  # the output goes on behind the prompt
    expected = [
        slot.token if slot.block == QUERY else slot.place + (layout.anchor_size if slot.block else 0) for slot in slots
    ]
    expected += range(layout.client_tokens, layout.client_tokens + 3)
    assert plan.positions(0, end).tolist() == expected
    start = data.draw(st.integers(0, end))
    stop = data.draw(st.integers(start, end))
    assert plan.positions(start, stop).tolist() == expected[start:stop]


@given(layouts(), st.data())
def test_the_pieces_of_any_chunk_see_what_the_mask_says(layout, data):
    """Behind the context, the keys of the blocks are in ``document_keys``, and the pieces have the query's own."""
    plan, slots = layout.plan, layout.slots
    start = data.draw(st.integers(0, len(slots) - 1))
    end = data.draw(st.integers(start + 1, len(slots)))
    position = start
    for first, stop, ranges in plan.split(start, end):
        assert first == position < stop
        assert all(begin % PAGE_SIZE == 0 for begin, _ in ranges)
        keys = [key for begin, limit in ranges for key in range(begin, limit)]
        assert len({slot.block for slot in slots[first:stop]}) == 1
        for query in range(first, stop):
            visible = {key for key in keys if key <= query}
            own = slots[query].block == QUERY
            elsewhere = plan.context_end if own else 0
            assert visible == {key for key in range(elsewhere, len(slots)) if layout.sees(query, key)}
            assert keys.index(query) == len(keys) - stop + query, "causal, aligned bottom-right"
        position = stop
    assert position == end


@given(layouts())
def test_block_keys_turn_the_query_from_where_blocks_were_computed_to_where_they_stand(layout):
    plan, slots = layout.plan, layout.slots
    keys, computed = plan.document_keys, plan.positions(0, plan.num_prompt_tokens)
    found = []
    for start, length, rotate_by in zip(keys.starts, keys.lengths, keys.rotate_by, strict=True):
        assert start % PAGE_SIZE == 0 and length > 0
        for index in range(start, start + length):
            assert computed[index] + rotate_by == slots[index].token
            found.append(index)
    assert found == [index for index, slot in enumerate(slots[: plan.context_end]) if slot.token is not None]
    assert (keys.rotate_by >= 0).all()


@given(layouts())
def test_blocks_and_progress_are_those_that_have_tokens(layout):
    plan, slots = layout.plan, layout.slots
    context = slots[: plan.context_end]
    starts = [index for index, slot in enumerate(context) if slot.place == 0]
    assert list(plan.starts) == starts
    assert plan.head_end == (next(start for start in starts if context[start].block) if layout.anchor_size else 0)
    for index, slot in enumerate(context):
        assert plan.block_of(index) == slot.block - layout.first
    for number, start in enumerate(starts):
        block = plan.block(number)
        assert (block.start, block.position) == (start, plan.positions(start, start + 1)[0])
        assert all(slots[index].token is not None for index in range(block.start, block.end))
        seen = {index for first, stop in block.sees for index in range(first, stop)}
        assert seen == {index for index in range(start) if layout.sees(start, index)}
    for computed in range(len(slots) + 1):
        done = {slot.block for slot in context[:computed]} - {slot.block for slot in context[computed:]}
        assert blocks_done(plan, computed) == len(done)


@given(layouts())
def test_attended_keys_are_counted_without_padding(layout):
    plan, slots = layout.plan, layout.slots
    client = [index for index, slot in enumerate(slots) if slot.token is not None]
    pairs = [(query, key) for query in client for key in client if layout.sees(query, key)]
    in_context = [query for query, _ in pairs if query < plan.context_end]
    assert keys_attended(plan) == len(pairs)
    assert summary(plan)["dense_keys"] == len(client) * (len(client) + 1) // 2
    assert context_pairs(plan) / sum(layout.lengths) == len(in_context) / sum(layout.lengths)
    shown = summary(plan)
    assert shown["prompt_tokens"] + shown["padding_tokens"] == plan.num_prompt_tokens == len(slots)
    assert (shown["documents"], shown["context_end"]) == (True, sum(layout.lengths))


@settings(max_examples=30)
@given(layouts())
def test_a_plan_comes_back_from_the_wire(layout):
    plan = layout.plan
    packed = msgspec.msgpack.encode(RequestMetadata(plan).to_wire())
    assert RequestMetadata.from_wire(msgspec.msgpack.decode(packed)) == RequestMetadata(plan)
