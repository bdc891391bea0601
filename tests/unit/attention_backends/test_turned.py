"""Attention over blocks with positions of their own, as a step runs it: rows, pages and turned queries.

Compared with attention in float64 over queries and keys that are rotated for each pair at their true distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from starling.attention_backends.kernels import turned as kernels_turned
from starling.attention_backends.kernels.contract import Layout, Operands
from starling.attention_backends.kernels.dispatch import paged_attention
from starling.attention_backends.kernels.rotary import NO_ROTATION, Rotation, turn_back
from starling.attention_backends.kernels.triton.decode import num_splits
from starling.attention_backends.star import step as step_module
from starling.attention_backends.star import turned
from starling.attention_backends.star.metadata import virtual_metadata
from starling.attention_backends.star.rows import VirtualRows, split_rows
from starling.attention_backends.star.step import StarStep
from starling.attention_backends.star.turned import OwnRows, make_turned_rows, with_own_rows
from starling.scheduler.star.client_tokens import client_index
from starling.scheduler.star.documents import lay_out
from starling.scheduler.star.plan import StarPlan
from tests.unit.attention_backends.test_rows import batch_metadata
from tests.unit.device_copies import AsyncCopies
from tests.unit.masks import mask_of

PAGE_SIZE, COLUMNS, HEADS, KV_HEADS, SIZE, SCALE = 4, 40, 4, 2, 32, 0.2
NUM_POSITIONS = PAGE_SIZE * COLUMNS
ROTARY = [(True, SIZE), (False, SIZE), (True, 16), (False, 8)]  # style, rotated elements of a head


def frequencies(rotary_dim: int) -> torch.Tensor:
    return 0.7 ** torch.arange(rotary_dim // 2, dtype=torch.float64)


def rotate(x: torch.Tensor, positions: torch.Tensor, rotary_dim: int, is_neox_style: bool) -> torch.Tensor:
    """(tokens, heads, size) float64, each token turned to its position; by complex numbers."""
    part = x[..., :rotary_dim]
    pairs = part.unflatten(-1, (2, -1)).mT if is_neox_style else part.unflatten(-1, (-1, 2))
    angles = torch.outer(positions.double(), frequencies(rotary_dim))[:, None]
    found = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    return torch.cat([(found.mT if is_neox_style else found).flatten(-2), x[..., rotary_dim:]], -1)


@dataclass(frozen=True)
class Row:
    """A request: its plan, and the tokens ``[start, end)`` of this step."""

    plan: StarPlan | None
    start: int
    end: int

    def positions(self) -> torch.Tensor:
        """At which position each token up to ``end`` is computed."""
        if self.plan and self.plan.documents:
            return torch.from_numpy(self.plan.positions(0, self.end))
        return torch.arange(self.end)

    def true_positions(self) -> torch.Tensor:
        """Where each token stands in the client's prompt."""
        if self.plan and self.plan.documents:
            return torch.tensor([client_index(self.plan, index) for index in range(self.end)])
        return torch.arange(self.end)

    def mask(self) -> torch.Tensor:
        """(end, end) bool: which keys each token sees."""
        plan, end = self.plan, self.end
        if not (plan and plan.documents):
            return mask_of(plan or StarPlan(PAGE_SIZE, 0, 0, 0, end), end)
        index = torch.arange(end)
        block, real = torch.full((end,), len(plan.documents)), index >= plan.context_end
        for number, (start, stop) in reversed(list(enumerate(plan.documents))):
            limit = plan.documents[number + 1][0] if number + 1 < len(plan.documents) else plan.context_end
            block[(index >= start) & (index < limit)] = number
            real[start:stop] = True
        in_context = (block[:, None] == block) | (index < plan.anchor_size)
        return torch.where((index >= plan.context_end)[:, None], real, in_context) & (index <= index[:, None])


def expected(row: Row, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rotary) -> torch.Tensor:
    """(queries, heads, size): the attention of the row's queries, which behind a plan's context see true distances."""
    is_neox_style, rotary_dim = rotary
    own, true = row.positions(), row.true_positions()
    is_query = torch.arange(row.end) >= (row.plan.context_end if (row.plan and row.plan.documents) else row.end)
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = []
    for positions in (own, true):
        turned_query = rotate(query, positions[row.start :], rotary_dim, is_neox_style)
        turned_key = rotate(key, positions, rotary_dim, is_neox_style)
        scores.append(torch.einsum("qhd,khd->qhk", turned_query, turned_key) * SCALE)
    found = torch.where(is_query[row.start :, None, None], scores[1], scores[0])
    found = found.masked_fill(~row.mask()[row.start :, None], float("-inf"))
    return torch.einsum("qhk,khd->qhd", found.softmax(-1), value)


class Batch:
    """A step over random queries, and keys and values in the pages of each row."""

    def __init__(self, rows: list[Row], rotary: tuple[bool, int]) -> None:
        torch.manual_seed(0)
        is_neox_style, rotary_dim = rotary
        self.rows, self.rotary = rows, rotary
        self.query_lens, self.seq_lens = [row.end - row.start for row in rows], [row.end for row in rows]
        self.common = batch_metadata(self.query_lens, self.seq_lens, COLUMNS)
        self.query = torch.randn(sum(self.query_lens), HEADS, SIZE, dtype=torch.float64)
        self.raw_keys, self.raw_values = torch.randn(2, len(rows) * COLUMNS * PAGE_SIZE, KV_HEADS, SIZE).double()
        positions = torch.zeros(len(self.raw_keys), dtype=torch.int64)
        self.positions = []
        for number, row in enumerate(rows):
            first = number * COLUMNS * PAGE_SIZE
            positions[first : first + row.end] = row.positions()
            self.positions.append(row.positions()[row.start :])
        keys = rotate(self.raw_keys, positions, rotary_dim, is_neox_style)
        pages = (len(rows) * COLUMNS, PAGE_SIZE, KV_HEADS, SIZE)
        self.caches = keys.float().view(pages), self.raw_values.float().view(pages)
        angles = torch.outer(torch.arange(NUM_POSITIONS).double(), frequencies(rotary_dim))
        self.rotation = Rotation(angles.cos().float(), angles.sin().float(), is_neox_style)

    def split(self) -> VirtualRows:
        plans = [row.plan for row in self.rows]
        return split_rows(plans, self.query_lens, self.seq_lens, PAGE_SIZE)

    def run(self) -> torch.Tensor:
        """The step's output, as a layer computes it."""
        virtual = self.split()
        metadata = virtual_metadata(self.common, virtual)
        step = StarStep({}, {}, list, lambda rows: None, rotations={"layer": self.rotation})
        step.keep_block_tables(virtual, self.common, metadata, PAGE_SIZE)
        query = rotate(self.query, torch.cat(self.positions), self.rotary[1], self.rotary[0]).float()
        out = torch.full_like(query, float("nan"))
        rows = metadata.block_table_tensor, metadata.query_start_loc, metadata.seq_lens
        paged_attention(Operands(query, *self.caches, *rows, scale=SCALE, out=out))  # as vLLM's kernel, of all rows
        for number in np.unique(virtual.turned.row):
            out[slice(*metadata.query_start_loc_cpu[number : number + 2])] = float("nan")
        step.turned_attention(PAGE_SIZE).attend("layer", query, out, self.caches, Layout.PAGES, scale=SCALE)
        return out

    def check(self) -> None:
        parts = []
        for number, (row, query) in enumerate(zip(self.rows, self.query.split(self.query_lens), strict=True)):
            own = slice(number * COLUMNS * PAGE_SIZE, number * COLUMNS * PAGE_SIZE + row.end)
            parts.append(expected(row, query, self.raw_keys[own], self.raw_values[own], self.rotary))
        torch.testing.assert_close(self.run().double(), torch.cat(parts), rtol=1e-4, atol=1e-5)


def plan_of(lengths: list[int], anchor_size: int = 0, query: int = 9) -> StarPlan:
    """A plan with blocks of these lengths, the head first."""
    ends = np.cumsum([0, *filter(None, lengths)]).tolist()
    blocks, end = lay_out(list(pairwise(ends)), PAGE_SIZE)
    return StarPlan(64, anchor_size, 0, end, end + query, documents=blocks)


WITH_HEAD, HEADLESS = plan_of([10, 7, 1, 8, 5], 8), plan_of([0, 3, 12, 1])
NO_ANCHOR, SHORT = plan_of([6, 9, 2]), plan_of([1, 1, 1], query=2)
MIXED = [
    Row(WITH_HEAD, WITH_HEAD.context_end + 6, WITH_HEAD.num_prompt_tokens),  # the end of its query
    Row(None, 20, 33),
    Row(HEADLESS, 5, HEADLESS.num_prompt_tokens - 2),  # of a block, and of the query
    Row(StarPlan(8, 8, 0, 30, 40), 3, 35),
    Row(NO_ANCHOR, NO_ANCHOR.num_prompt_tokens + 4, NO_ANCHOR.num_prompt_tokens + 5),  # an output token
    Row(SHORT, 0, SHORT.num_prompt_tokens),
    Row(None, 50, 51),
    Row(WITH_HEAD, 9, 30),  # of the context alone
    Row(StarPlan(8, 8, 0, 30, 40), 41, 42),
    Row(HEADLESS, HEADLESS.num_prompt_tokens, HEADLESS.num_prompt_tokens + 1),
]


@pytest.mark.parametrize("rotary", ROTARY, ids=["neox", "pairs", "neox, half", "pairs, quarter"])
@pytest.mark.parametrize("max_tokens", [1, 7, 8192])
def test_a_step_attends_at_true_distances(rotary, max_tokens, monkeypatch):
    monkeypatch.setitem(turned.MAX_TOKENS, "cpu", max_tokens)
    Batch(MIXED, rotary).check()


def test_decode_steps_of_several_requests():
    ends = [plan.num_prompt_tokens + 3 for plan in (WITH_HEAD, HEADLESS, NO_ANCHOR, SHORT)]
    plans = (WITH_HEAD, HEADLESS, NO_ANCHOR, SHORT)
    rows = [Row(plan, end - 1, end) for plan, end in zip(plans, ends, strict=True)]
    others = [Row(None, 90, 91), Row(StarPlan(8, 8, 0, 30, 40), 44, 45)]
    for batch in (Batch(rows, ROTARY[0]), Batch([*others, *rows], ROTARY[0]), Batch([*rows[:1], *others], ROTARY[2])):
        batch.check()


def test_a_gpu_is_not_waited_for(monkeypatch):
    monkeypatch.setitem(turned.MAX_TOKENS, "meta", 5)
    monkeypatch.setitem(turned.MAX_KEYS, "meta", 16)
    batch = Batch(MIXED, ROTARY[0])
    virtual = batch.split()
    first, table = np.cumsum(virtual.query_lens) - virtual.query_lens, batch.common.block_table_tensor.to("meta")
    with AsyncCopies(monkeypatch, turned):
        calls = list(make_turned_rows(virtual.turned, first, virtual.query_lens, table, PAGE_SIZE))
        lens = torch.empty(3, dtype=torch.int32, device="meta")
        own = OwnRows(3, True, PAGE_SIZE, np.array([9, 1, 150]), table, torch.empty(4, device="meta"), lens)
        calls.append(with_own_rows(own, calls[0]))
    assert len(calls) > 2
    assert all(call.block_table.device.type == "meta" for call in calls)
    assert len(calls[-1].seq_lens) == len(calls[-1].num_keys) > 3 + len(calls[0].seq_lens), "long rows are divided"


def test_rows_of_a_cpu_are_not_divided():
    """Its op divides them itself."""
    batch = Batch([Row(None, 90, 91), Row(SHORT, SHORT.num_prompt_tokens, SHORT.num_prompt_tokens + 1)], ROTARY[0])
    virtual = batch.split()
    calls = list(make_turned_rows(virtual.turned, np.arange(2), np.ones(2, int), batch.common.block_table_tensor, 4))
    lens = torch.tensor([91, 1], dtype=torch.int32)
    own = OwnRows(2, True, PAGE_SIZE, np.array([91, 1]), batch.common.block_table_tensor, lens, lens)
    assert with_own_rows(own, calls[0]).seq_lens.tolist() == [91, 1, *calls[0].seq_lens.tolist()]


def test_the_turn_is_what_makes_it_right():
    """Without a turn, the same step differs: the test above can fail."""
    batch = Batch(MIXED, ROTARY[0])
    right = batch.run()
    batch.rotation = Rotation(torch.ones_like(batch.rotation.cos), torch.zeros_like(batch.rotation.sin), True)
    assert (batch.run() - right).abs().max() > 0.1


@pytest.mark.parametrize("max_tokens", [1, 5, 1000])
def test_each_query_meets_each_block_once_in_calls_of_few_tokens(max_tokens, monkeypatch):
    monkeypatch.setitem(turned.MAX_TOKENS, "cpu", max_tokens)
    batch = Batch(MIXED, ROTARY[0])
    virtual = batch.split()
    first = np.cumsum(virtual.query_lens) - virtual.query_lens
    table = batch.common.block_table_tensor
    calls = list(make_turned_rows(virtual.turned, first, virtual.query_lens, table, PAGE_SIZE))
    longest = int(virtual.query_lens[virtual.turned.row].max())
    met, starts = [], np.concatenate(([0], np.cumsum(batch.query_lens)))
    for call in calls:
        assert len(call.tokens) == len(call.turns) == call.query_start_loc[-1] < max_tokens + longest
        for row, length in enumerate(call.seq_lens.tolist()):
            first, stop = call.query_start_loc[row : row + 2].tolist()
            pages = call.block_table[row, : -(-length // PAGE_SIZE)].tolist()
            met += [
                (token, pages[0], length, turn)
                for token, turn in zip(call.tokens[first:stop].tolist(), call.turns[first:stop].tolist(), strict=True)
            ]
            assert pages == list(range(pages[0], pages[0] + len(pages)))
    wanted = []
    for number, row in enumerate(MIXED):
        if row.plan and row.plan.documents:
            keys = row.plan.document_keys
            for index in range(max(row.start, row.plan.context_end), row.end):
                token = int(starts[number]) + index - row.start
                for start, length, turn in zip(keys.starts, keys.lengths, keys.turns, strict=True):
                    wanted.append((token, number * COLUMNS + start // PAGE_SIZE, length, turn))
    assert sorted(met) == sorted(wanted)
    assert max_tokens > 900 or len(calls) > 1


def test_blocks_that_are_not_turned_have_plain_attention():
    """Keys computed where they stand: blocks of whole pages, the anchor none, in one row of plain attention."""
    torch.manual_seed(0)
    plan, rows = plan_of([8, 4, 12]), [5, 1]
    end = plan.num_prompt_tokens
    common = batch_metadata(rows, [end, end], COLUMNS)
    virtual = split_rows([plan, plan], rows, [end, end], PAGE_SIZE)
    virtual.turned.turn[:] = 0
    query = torch.randn(6, HEADS, SIZE)
    keys, values = torch.randn(2, 2 * COLUMNS, PAGE_SIZE, KV_HEADS, SIZE)
    metadata, out = virtual_metadata(common, virtual), torch.empty_like(query)
    angles = torch.randn(NUM_POSITIONS, SIZE // 2)
    angles[0] = 0
    step = StarStep({}, {}, list, lambda rows: None, rotations={"layer": Rotation(angles.cos(), angles.sin(), True)})
    step.keep_block_tables(virtual, common, metadata, PAGE_SIZE)
    step.turned_attention(PAGE_SIZE).attend("layer", query, out, (keys, values), Layout.PAGES, scale=SCALE)
    table, starts, lens = common.block_table_tensor, common.query_start_loc, common.seq_lens
    plain, _ = paged_attention(Operands(query, keys, values, table, starts, lens, scale=SCALE))
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary", ROTARY)
def test_a_query_is_turned_back_by_its_angle(rotary, dtype):
    is_neox_style, rotary_dim = rotary
    torch.manual_seed(0)
    query, turns = torch.randn(5, HEADS, SIZE, dtype=torch.float64), torch.tensor([0, 1, 7, 90, 3])
    angles = torch.outer(turns.double(), frequencies(rotary_dim))
    got = turn_back(query.to(dtype), angles.cos().float(), angles.sin().float(), is_neox_style)
    assert got.dtype == dtype
    wanted = rotate(query, -turns, rotary_dim, is_neox_style)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=3e-2 if dtype is torch.bfloat16 else 1e-5)
    assert torch.equal(got[..., rotary_dim:], query.to(dtype)[..., rotary_dim:])


def test_a_step_without_queries_behind_blocks_has_no_turned_rows():
    batch = Batch([Row(WITH_HEAD, 9, 30), Row(None, 3, 5)], ROTARY[0])
    assert batch.split().turned is None


@pytest.mark.parametrize("max_keys", [1, 4, 8, 20])
def test_rows_of_decodes_are_divided_into_parts_of_few_keys(max_keys, monkeypatch):
    """And give what whole rows give. The last bound divides some rows only."""
    monkeypatch.setitem(turned.MAX_KEYS, "cpu", max_keys)
    ends = [plan.num_prompt_tokens + 3 for plan in (WITH_HEAD, HEADLESS)]
    rows = [Row(plan, end - 1, end) for plan, end in zip((WITH_HEAD, HEADLESS), ends, strict=True)]
    Batch([Row(None, 90, 91), *rows, Row(StarPlan(8, 8, 0, 30, 40), 44, 45)], ROTARY[0]).check()


def test_a_part_may_have_no_keys_where_the_host_knows_an_upper_bound_only(monkeypatch):
    """As with asynchronous scheduling, which counts tokens that may be rejected."""
    monkeypatch.setitem(turned.MAX_KEYS, "cpu", 8)
    given = step_module.OwnRows
    monkeypatch.setattr(step_module, "OwnRows", lambda num_keys, **fields: given(num_keys=num_keys + 30, **fields))
    end = WITH_HEAD.num_prompt_tokens + 4
    Batch([Row(None, 90, 91), Row(WITH_HEAD, end - 1, end)], ROTARY[0]).check()


def most_keys_of_a_program(monkeypatch, rows: list[Row], page_size: int, kv_heads: int) -> int:
    """The most keys of a row that one program of a GPU with 132 multiprocessors reads in a step of decodes."""
    lens, columns = [row.end for row in rows], -(-max(row.end for row in rows) // page_size)
    common = batch_metadata([1] * len(rows), lens, columns)
    virtual = split_rows([row.plan for row in rows], [1] * len(rows), lens, page_size)
    step = StarStep({}, {}, list, lambda rows: None, rotations={"layer": NO_ROTATION})
    step.keep_block_tables(virtual, common, virtual_metadata(common, virtual), page_size)
    found = []

    def attend(operands: Operands):
        sizes = operands.sizes
        splits = num_splits(sizes.rows, sizes.kv_heads, operands.block_table.shape[1] * page_size, 132)
        found.append(-(-int(operands.seq_lens.max()) // splits))
        return operands.query.new_zeros(sizes.tokens, sizes.heads, 16), operands.query.new_zeros(sizes.tokens, kv_heads)

    monkeypatch.setattr(kernels_turned, "paged_attention", attend)
    monkeypatch.setattr(kernels_turned.cpu, "has_op_for", lambda operands: False)
    query, cache = torch.zeros(len(rows), kv_heads, 16), torch.zeros(1, page_size, kv_heads, 16)
    step.turned_attention(page_size).attend(
        "layer", query, torch.empty_like(query), (cache, cache), Layout.PAGES, scale=1.0
    )
    return max(found)


def test_no_program_of_a_gpu_reads_a_whole_long_prompt_beside_many_short_rows(monkeypatch):
    """8 requests of 16 documents beside a dense one of 128k tokens: one program read all of its 131,072 keys."""
    monkeypatch.setitem(turned.MAX_KEYS, "cpu", turned.MAX_KEYS["cuda"])
    blocks = tuple((first, first + 992) for first in range(0, 16 * 1024, 1024))
    plan = StarPlan(1024, 0, 0, 16 * 1024, 16 * 1024 + 40, documents=blocks)
    rows = [Row(plan, plan.num_prompt_tokens, plan.num_prompt_tokens + 1)] * 8 + [Row(None, 131071, 131072)]
    assert most_keys_of_a_program(monkeypatch, rows, 16, 8) <= 4096
    long = StarPlan(65536, 0, 0, 65536, 65576, documents=((0, 100), (112, 65536)))
    rows = [Row(long, long.num_prompt_tokens, long.num_prompt_tokens + 1)] * 40
    assert most_keys_of_a_program(monkeypatch, rows, 16, 8) <= 4096, "a long document is divided too"
