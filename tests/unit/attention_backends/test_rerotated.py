"""Attention over documents, as a step runs it: rows, pages and re-rotated queries.

Compared with attention in float64 over queries and keys that are rotated for each pair at their true distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, pairwise, permutations

import numpy as np
import pytest
import torch

from starling.attention_backends.kernels import ranges
from starling.attention_backends.kernels.contract import Layout, Operands, Rotation, rotate_back
from starling.attention_backends.kernels.dispatch import paged_attention
from starling.attention_backends.kernels.triton import paged
from starling.attention_backends.star import rerotated_rows
from starling.attention_backends.star.document_step import DocumentStep
from starling.attention_backends.star.metadata import virtual_metadata
from starling.attention_backends.star.range_attention import make_range_attention, make_token_ranges
from starling.attention_backends.star.rerotated_rows import add_rows, make_rerotated_rows, ranges_as_rows
from starling.attention_backends.star.rows import VirtualRows, split_rows
from starling.scheduler.planning.documents import lay_out
from starling.scheduler.planning.plan import StarPlan, client_index
from tests.unit.attention_backends.test_rows import batch_metadata
from tests.unit.device_copies import AsyncCopies
from tests.unit.masks import mask_of

PAGE_SIZE, COLUMNS, HEADS, KV_HEADS, SIZE, SCALE = 4, 40, 4, 2, 32, 0.2
NUM_POSITIONS = PAGE_SIZE * COLUMNS
ROTARY = [(True, SIZE), (False, SIZE), (True, 16), (False, 8)]  # style, rotated elements of a head


def frequencies(rotary_dim: int) -> torch.Tensor:
    return 0.7 ** torch.arange(rotary_dim // 2, dtype=torch.float64)


def rotate(x: torch.Tensor, positions: torch.Tensor, rotary_dim: int, is_neox_style: bool) -> torch.Tensor:
    """(tokens, heads, size) float64, each token rotated to its position; by complex numbers."""
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
        rerotated_query = rotate(query, positions[row.start :], rotary_dim, is_neox_style)
        rerotated_key = rotate(key, positions, rotary_dim, is_neox_style)
        scores.append(torch.einsum("qhd,khd->qhk", rerotated_query, rerotated_key) * SCALE)
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
        rows = virtual_metadata(self.common, virtual)
        step = DocumentStep()
        step.keep_block_tables(virtual, self.common, rows, PAGE_SIZE)
        query = rotate(self.query, torch.cat(self.positions), self.rotary[1], self.rotary[0]).float()
        out = torch.full_like(query, float("nan"))
        tables = rows.block_table_tensor, rows.query_start_loc, rows.seq_lens
        paged_attention(Operands(query, *self.caches, *tables, scale=SCALE, out=out))  # as vLLM's kernel, of all rows
        for number in np.unique(virtual.rerotated.row):
            out[slice(*rows.query_start_loc_cpu[number : number + 2])] = float("nan")
        step.attention(PAGE_SIZE).attend(self.rotation, query, out, self.caches, Layout.PAGES, scale=SCALE)
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
    monkeypatch.setattr(rerotated_rows, "MAX_TOKENS", max_tokens)
    Batch(MIXED, rotary).check()


def test_decode_steps_of_several_requests():
    ends = [plan.num_prompt_tokens + 3 for plan in (WITH_HEAD, HEADLESS, NO_ANCHOR, SHORT)]
    plans = (WITH_HEAD, HEADLESS, NO_ANCHOR, SHORT)
    rows = [Row(plan, end - 1, end) for plan, end in zip(plans, ends, strict=True)]
    others = [Row(None, 90, 91), Row(StarPlan(8, 8, 0, 30, 40), 44, 45)]
    for batch in (Batch(rows, ROTARY[0]), Batch([*others, *rows], ROTARY[0]), Batch([*rows[:1], *others], ROTARY[2])):
        batch.check()


def test_a_gpu_is_not_waited_for(monkeypatch):
    batch = Batch(MIXED, ROTARY[0])
    virtual, names = batch.split(), ("block_table_tensor", "query_start_loc", "seq_lens")
    common = batch.common.replace(**{name: getattr(batch.common, name).to("meta") for name in names})
    with AsyncCopies(monkeypatch, ranges):
        made = make_range_attention(virtual, common, PAGE_SIZE, 4)
    assert {table.numbers.device.type for table in made.tables} == {"meta"}
    single, several = made.tables
    assert single.max_places == 2, "the two output tokens behind documents"
    lens = [row.end - max(row.start, row.plan.context_end) for row in MIXED if row.plan and row.plan.documents]
    assert several.max_places == sum(-(-length // 4) for length in lens if length > 1)


def test_the_turn_is_what_makes_it_right():
    """Without a rotation, the same step differs: the test above can fail."""
    batch = Batch(MIXED, ROTARY[0])
    right = batch.run()
    batch.rotation = Rotation(torch.ones_like(batch.rotation.cos), torch.zeros_like(batch.rotation.sin), True)
    assert (batch.run() - right).abs().max() > 0.1


@pytest.mark.parametrize("max_tokens", [1, 5, 1000])
def test_each_query_meets_each_block_once_in_calls_of_few_tokens(max_tokens, monkeypatch):
    monkeypatch.setattr(rerotated_rows, "MAX_TOKENS", max_tokens)
    batch = Batch(MIXED, ROTARY[0])
    virtual = batch.split()
    first = np.cumsum(virtual.query_lens) - virtual.query_lens
    table = batch.common.block_table_tensor
    calls = list(make_rerotated_rows(virtual.rerotated, first, virtual.query_lens, table, PAGE_SIZE))
    longest = int(virtual.query_lens[virtual.rerotated.row].max())
    met, starts = [], np.concatenate(([0], np.cumsum(batch.query_lens)))
    for call in calls:
        assert len(call.tokens) == len(call.rotate_by) == call.query_start_loc[-1] < max_tokens + longest
        for row, length in enumerate(call.seq_lens.tolist()):
            first, stop = call.query_start_loc[row : row + 2].tolist()
            pages = call.block_table[row, : -(-length // PAGE_SIZE)].tolist()
            met += [
                (token, pages[0], length, rotate_by)
                for token, rotate_by in zip(
                    call.tokens[first:stop].tolist(), call.rotate_by[first:stop].tolist(), strict=True
                )
            ]
            assert pages == list(range(pages[0], pages[0] + len(pages)))
    wanted = []
    for number, row in enumerate(MIXED):
        if row.plan and row.plan.documents:
            keys = row.plan.document_keys
            for index in range(max(row.start, row.plan.context_end), row.end):
                token = int(starts[number]) + index - row.start
                for start, length, rotate_by in zip(keys.starts, keys.lengths, keys.rotate_by, strict=True):
                    wanted.append((token, number * COLUMNS + start // PAGE_SIZE, length, rotate_by))
    assert sorted(met) == sorted(wanted)
    assert max_tokens > 900 or len(calls) > 1


def test_blocks_that_are_not_turned_have_plain_attention():
    """Keys computed where they stand: blocks of whole pages, the anchor none, in one row of plain attention."""
    torch.manual_seed(0)
    plan, queries = plan_of([8, 4, 12]), [5, 1]
    end = plan.num_prompt_tokens
    common = batch_metadata(queries, [end, end], COLUMNS)
    virtual = split_rows([plan, plan], queries, [end, end], PAGE_SIZE)
    virtual.rerotated.rotate_by[:] = 0
    query = torch.randn(6, HEADS, SIZE)
    keys, values = torch.randn(2, 2 * COLUMNS, PAGE_SIZE, KV_HEADS, SIZE)
    rows, out = virtual_metadata(common, virtual), torch.empty_like(query)
    angles = torch.randn(NUM_POSITIONS, SIZE // 2)
    angles[0] = 0
    rotation, step = Rotation(angles.cos(), angles.sin(), True), DocumentStep()
    step.keep_block_tables(virtual, common, rows, PAGE_SIZE)
    step.attention(PAGE_SIZE).attend(rotation, query, out, (keys, values), Layout.PAGES, scale=SCALE)
    table, starts, lens = common.block_table_tensor, common.query_start_loc, common.seq_lens
    plain, _ = paged_attention(Operands(query, keys, values, table, starts, lens, scale=SCALE))
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary", ROTARY)
def test_a_query_is_turned_back_by_its_angle(rotary, dtype):
    is_neox_style, rotary_dim = rotary
    torch.manual_seed(0)
    query, rotate_by = torch.randn(5, HEADS, SIZE, dtype=torch.float64), torch.tensor([0, 1, 7, 90, 3])
    angles = torch.outer(rotate_by.double(), frequencies(rotary_dim))
    got = rotate_back(query.to(dtype), angles.cos().float(), angles.sin().float(), is_neox_style)
    assert got.dtype == dtype
    wanted = rotate(query, -rotate_by, rotary_dim, is_neox_style)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=3e-2 if dtype is torch.bfloat16 else 1e-5)
    assert torch.equal(got[..., rotary_dim:], query.to(dtype)[..., rotary_dim:])


def test_a_step_without_queries_behind_blocks_has_no_rerotated_rows():
    batch = Batch([Row(WITH_HEAD, 9, 30), Row(None, 3, 5)], ROTARY[0])
    assert batch.split().rerotated is None


@pytest.mark.parametrize("extra", [0, 30])
def test_the_ranges_of_decodes_are_the_keys_that_their_tokens_see(extra):
    """``extra``: with asynchronous scheduling, the host counts tokens that may be rejected."""
    rows = [Row(plan, plan.num_prompt_tokens + 3, plan.num_prompt_tokens + 4) for plan in (WITH_HEAD, HEADLESS)]
    batch = Batch([Row(None, 90, 91), *rows], ROTARY[0])
    found = split_rows([row.plan for row in batch.rows], [1, 1, 1], [row.end + extra for row in batch.rows], PAGE_SIZE)
    made = make_token_ranges(found, np.array([1, 2]), PAGE_SIZE)
    assert made.rows.tolist() == [1, 2]
    as_rows = ranges_as_rows(made, batch.common.block_table_tensor, batch.common.seq_lens, PAGE_SIZE)
    for place, row in enumerate(rows):
        own = made.row == place
        spans = zip(made.first[own], as_rows.seq_lens[torch.from_numpy(own)].tolist(), strict=True)
        seen = [key for first, length in spans for key in range(first, first + length)]
        assert sorted(seen) == np.flatnonzero(row.mask()[-1]).tolist()


def test_no_program_of_a_gpu_reads_a_whole_long_prompt_beside_many_short_rows():
    """8 requests of 16 documents beside a dense one of 128k tokens: one program read all of its 131,072 keys."""
    blocks = tuple((first, first + 992) for first in range(0, 16 * 1024, 1024))
    plan = StarPlan(1024, 0, 0, 16 * 1024, 16 * 1024 + 40, documents=blocks)
    long = StarPlan(65536, 0, 0, 65536, 65576, documents=((0, 100), (112, 65536)))
    for plans in ([plan] * 8 + [long], [long] * 40):
        lens, ones = [one.num_prompt_tokens + 1 for one in plans], [1] * len(plans)
        made = make_token_ranges(split_rows(plans, ones, lens, 16), np.arange(len(plans)), 16)
        tiles, programs = made.packed(1)[1], paged.rows_that_fill(132, 8)
        assert programs == 33
        keys = sum(lens) / programs
        assert -(-tiles // programs) * ranges.TILE_KEYS < 1.1 * keys


LENGTHS = (13, 8, 21)
"""Tokens of the documents that requests share, each on pages of its own."""


def shared_documents(queries: list[int]):
    """Requests of the same documents, each in another order: their virtual rows, and the metadata of the batch.

    Only the tokens of the question and the output have pages of the request's own.
    """
    pages = np.cumsum([0, *(-(-length // PAGE_SIZE) for length in (8, *LENGTHS))])
    of_piece = [list(range(first, stop)) for first, stop in pairwise(pages)]
    plans, tables, ends, free = [], [], [], int(pages[-1])
    for order in islice(permutations((1, 2, 3)), len(queries)):
        pieces, start = [(0, 8)], 8
        for number in order:
            pieces.append((start, start := start + LENGTHS[number - 1]))
        blocks, end = lay_out(pieces, PAGE_SIZE)
        plans.append(StarPlan(64, 8, 0, end, end + 9, documents=blocks))
        tables.append([*of_piece[0], *(page for number in order for page in of_piece[number]), *range(free, free + 3)])
        free += 3
        ends.append(end + 9)
    common = batch_metadata(queries, ends, len(tables[0]))
    common.block_table_tensor.copy_(torch.tensor(tables, dtype=torch.int32))
    return split_rows(plans, queries, ends, PAGE_SIZE), common, free


def apart(pages: np.ndarray, *_) -> tuple[np.ndarray, np.ndarray]:
    """As ``grouped`` where nothing is in common."""
    return np.arange(len(pages)), np.ones(len(pages), dtype=bool)


def rows_of_step(virtual, common, decodes: bool):
    first = np.cumsum(virtual.query_lens) - virtual.query_lens
    if not decodes:
        return list(make_rerotated_rows(virtual.rerotated, first, virtual.query_lens, common.block_table_tensor, 4))
    made = make_token_ranges(virtual, np.arange(len(virtual.source)), PAGE_SIZE)
    return [ranges_as_rows(made, common.block_table_tensor, common.seq_lens, PAGE_SIZE)]


@pytest.mark.parametrize("queries", [[1, 1, 1, 1, 1], [7, 1, 9, 2]], ids=["decodes", "questions"])
def test_pages_that_requests_have_in_common_are_read_once_in_any_order(queries, monkeypatch):
    virtual, common, num_pages = shared_documents(queries)
    torch.manual_seed(0)
    query, caches = torch.randn(sum(queries), HEADS, SIZE), torch.randn(2, num_pages, PAGE_SIZE, KV_HEADS, SIZE)
    angles = torch.outer(torch.arange(NUM_POSITIONS).double(), frequencies(SIZE)).float()
    rotation, decodes = Rotation(angles.cos(), angles.sin(), True), max(queries) == 1
    results, read = [], []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(rerotated_rows, "grouped", apart)
        calls = rows_of_step(virtual, common, decodes)
        out, lse = torch.zeros(sum(queries), HEADS, SIZE), torch.full((sum(queries), HEADS), float("-inf"))
        add_rows(calls, rotation, query, tuple(caches), out, lse, scale=SCALE)
        results.append((out, lse))
        read.append(sum(int(call.seq_lens.sum()) for call in calls))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    documents, own = 8 + sum(LENGTHS), 9 * len(queries) if decodes else 0
    assert read == [documents + own, documents * len(queries) + own]


def test_equal_last_pages_are_not_enough_to_be_read_together():
    pages, keys = np.array([[1, 2, 9], [1, 3, 9], [1, 2, 9], [1, 2, 9]], dtype=np.int32), np.array([12, 12, 12, 11])
    order, begins = rerotated_rows.grouped(pages, keys, PAGE_SIZE)
    groups = np.split(order, np.flatnonzero(begins)[1:])
    assert all(len({(*pages[one], keys[one]) for one in group}) == 1 for group in groups)
