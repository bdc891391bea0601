"""Virtual rows: plain paged causal attention over them gives the output of Star Attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.kernels.reference import masked_attention
from starling.attention_backends.star import metadata
from starling.attention_backends.star.metadata import virtual_metadata
from starling.attention_backends.star.rows import VirtualRows, _Pieces, split_rows
from starling.scheduler.planning.plan import StarPlan
from tests.unit.device_copies import AsyncCopies
from tests.unit.masks import mask_of

PAGE_SIZE, HEADS, KV_HEADS, SIZE = 4, 2, 1, 8


def batch_metadata(query_lens: list[int], seq_lens: list[int], columns: int, **fields) -> CommonAttentionMetadata:
    """A batch whose row r has the pages r * columns to (r + 1) * columns - 1."""
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    rows = len(query_lens)
    arguments = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": lens,
        "seq_lens_cpu_upper_bound": lens,
        "num_reqs": rows,
        "num_actual_tokens": sum(query_lens),
        "max_query_len": max(query_lens),
        "max_seq_len": max(seq_lens),
        "block_table_tensor": torch.arange(rows * columns, dtype=torch.int32).view(rows, columns),
        "slot_mapping": torch.arange(sum(query_lens)),
        "is_prefilling": torch.tensor([queries > 1 for queries in query_lens]),
        "req_idx": np.arange(rows) + 40,
    }
    return CommonAttentionMetadata(**(arguments | fields))


def paged_causal(query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, common) -> torch.Tensor:
    """Causal attention, aligned bottom-right, over the pages of a block table, one row at a time."""
    out = torch.empty_like(query)
    for row in range(common.num_reqs):
        first, last = common.query_start_loc[row : row + 2].tolist()
        length = int(common.seq_lens[row])
        page_ids = common.block_table_tensor[row, : -(-length // PAGE_SIZE)].long()
        key = key_pages[page_ids].flatten(0, 1)[:length]
        value = value_pages[page_ids].flatten(0, 1)[:length]
        queries = last - first
        mask = torch.arange(length)[None] <= (length - queries + torch.arange(queries))[:, None]
        if queries:
            out[first:last] = masked_attention(query[first:last], key, value, mask, SIZE**-0.5)[0]
    return out


@st.composite
def batches(draw):
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        num_tokens = draw(st.integers(1, 70))
        start = draw(st.integers(0, num_tokens - 1))
        block_size = PAGE_SIZE * draw(st.integers(1, 5))
        sizes = st.integers(0, block_size // PAGE_SIZE).map(lambda num_pages: num_pages * PAGE_SIZE)
        plan = StarPlan(block_size, draw(sizes), draw(sizes), draw(st.integers(0, num_tokens)), num_tokens)
        rows.append((draw(st.sampled_from([plan, plan, None])), start, num_tokens))
    return rows


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(0, 2), st.integers(0, 2**31))
def test_paged_causal_attention_over_virtual_rows_is_star_attention(rows, padding, seed):
    """For mixed batches with any chunks and sizes, and with padding rows at the end as in CUDA graphs."""
    torch.manual_seed(seed)
    columns = 70 // PAGE_SIZE + 1
    num_rows = len(rows) + padding
    query_lens = [end - start for _, start, end in rows] + [0] * padding
    common = batch_metadata(query_lens, [end for _, _, end in rows] + [0] * padding, columns)
    plans = [plan for plan, _, _ in rows] + [None] * padding
    virtual = split_rows(plans, query_lens, common.seq_lens.tolist(), PAGE_SIZE)
    query = torch.randn(sum(query_lens), HEADS, SIZE, dtype=torch.float64)
    key_pages, value_pages = torch.randn(2, num_rows * columns, PAGE_SIZE, KV_HEADS, SIZE, dtype=torch.float64)
    rewritten = common if virtual is None else virtual_metadata(common, virtual)
    out = paged_causal(query, key_pages, value_pages, rewritten)
    for row, (plan, start, end) in enumerate(rows):
        mask = mask_of(plan or StarPlan(PAGE_SIZE, 0, 0, 0, end), end)[start:]
        page_ids = common.block_table_tensor[row].long()
        key, value = key_pages[page_ids].flatten(0, 1)[:end], value_pages[page_ids].flatten(0, 1)[:end]
        first, last = common.query_start_loc[row : row + 2].tolist()
        expected = masked_attention(query[first:last], key, value, mask, SIZE**-0.5)[0]
        torch.testing.assert_close(out[first:last], expected, rtol=1e-10, atol=1e-10)


@settings(deadline=None)
@given(batches())
def test_counts_of_tokens_and_pairs_are_those_of_the_rows(rows):
    query_lens = [end - start for _, start, end in rows]
    virtual = split_rows([plan for plan, _, _ in rows], query_lens, [end for _, _, end in rows], PAGE_SIZE)
    in_context = [plan is not None and start < plan.context_end for plan, start, _ in rows]
    if virtual is None:
        assert not any(in_context)
        return
    assert any(in_context)
    lens, totals = virtual.query_lens[virtual.star], virtual.seq_lens[virtual.star]
    assert virtual.context_tokens == lens.sum()
    assert virtual.star_pairs == (lens * (totals - lens) + lens * (lens + 1) // 2).sum()
    assert virtual.star_pairs <= virtual.dense_pairs
    assert virtual.query_lens.sum() == sum(query_lens)


def test_dense_and_decode_batches_are_not_split():
    plan = StarPlan(8, 8, 0, 30, 40)
    assert split_rows([None, None], [5, 1], [5, 9], PAGE_SIZE) is None
    assert split_rows([plan, plan], [1, 10], [41, 40], PAGE_SIZE) is None  # a decode, and a chunk of the query
    assert split_rows([plan], [11], [40], PAGE_SIZE) is not None


def test_each_field_has_the_values_of_the_virtual_rows():
    plan = StarPlan(8, 8, 0, 30, 40)
    common = batch_metadata([1, 20, 3], [9, 20, 3], columns=12)
    rows = split_rows([None, plan, None], [1, 20, 3], [9, 20, 3], PAGE_SIZE)
    virtual = virtual_metadata(common, rows)
    assert rows.source.tolist() == [0, 1, 1, 1, 2]
    assert virtual.query_start_loc.tolist() == [0, 1, 9, 17, 21, 24]
    assert virtual.seq_lens.tolist() == virtual.seq_lens_cpu_upper_bound.tolist() == [9, 8, 16, 12, 3]
    assert virtual.block_table_tensor[3, :3].tolist() == [
        12,
        13,
        16,
    ]  # the anchor, then block 2's first page
    assert (virtual.num_reqs, virtual.max_query_len, virtual.max_seq_len) == (5, 8, 16)
    assert virtual.is_prefilling.tolist() == [False, True, True, True, True]
    assert virtual.req_idx.tolist() == [40, 41, 41, 41, 42]
    assert virtual.slot_mapping is common.slot_mapping
    assert virtual.compute_num_computed_tokens().tolist() == [8, 0, 8, 8, 0]


def test_a_gpu_is_not_waited_for(monkeypatch):
    plan = StarPlan(8, 8, 0, 30, 40)
    common = batch_metadata([1, 20, 3], [9, 20, 3], columns=12)
    for name in ("query_start_loc", "seq_lens", "block_table_tensor"):
        setattr(common, name, getattr(common, name).to("meta"))
    rows = split_rows([None, plan, None], [1, 20, 3], [9, 20, 3], PAGE_SIZE)
    with AsyncCopies(monkeypatch, metadata):
        virtual = virtual_metadata(common, rows)
    assert virtual.seq_lens.shape == (5,)
    assert virtual.block_table_tensor.device.type == "meta"


def test_decode_rows_keep_the_device_length():
    """Under async scheduling, the length of a decode row on the host is only an upper bound."""
    plan = StarPlan(8, 8, 0, 30, 40)
    upper = torch.tensor([12, 20], dtype=torch.int32)
    common = batch_metadata([1, 20], [9, 20], columns=12, seq_lens_cpu_upper_bound=upper)
    rows = split_rows([None, plan], [1, 20], upper.tolist(), PAGE_SIZE)
    assert virtual_metadata(common, rows).seq_lens.tolist() == [9, 8, 16, 12]


@pytest.mark.parametrize("field", ["dcp_local_seq_lens", "encoder_seq_lens", "rswa_prefix_lens"])
def test_fields_that_can_not_be_split_are_refused(field):
    plan = StarPlan(8, 8, 0, 30, 40)
    common = batch_metadata([20], [20], columns=12, **{field: torch.tensor([20])})
    with pytest.raises(RuntimeError, match=field):
        virtual_metadata(common, split_rows([plan], [20], [20], PAGE_SIZE))


DOCUMENTS = StarPlan(12, 8, 0, 32, 40, documents=((0, 8), (8, 18), (20, 31)))
BLOCKS = StarPlan(8, 4, 4, 32, 40)


@st.composite
def decodes(draw) -> tuple[list[StarPlan | None], list[int], list[int]]:
    """Rows behind their contexts, without a plan, and of padding, with some tokens each."""
    plans = draw(st.lists(st.sampled_from([DOCUMENTS, BLOCKS, None]), min_size=1, max_size=6))
    queries = [draw(st.integers(1, 3)) for _ in plans]
    seq_lens = [draw(st.integers(32, 60)) + count for count in queries]
    padding = draw(st.integers(0, 2))
    return [*plans, *[None] * padding], [*queries, *[0] * padding], [*seq_lens, *[0] * padding]


@given(decodes())
def test_rows_behind_contexts_are_those_that_are_made_one_by_one(batch):
    """Decodes are made together: 64 rows of 128 documents took 2 ms of each step one by one."""
    plans, query_lens, seq_lens = batch
    found = split_rows(plans, query_lens, seq_lens, PAGE_SIZE)
    pieces = _Pieces(PAGE_SIZE)
    for row, (plan, queries, end) in enumerate(zip(plans, query_lens, seq_lens, strict=True)):
        whole = [(end - queries, end, ((0, end),))]
        for piece in whole if plan is None else plan.split(end - queries, end):
            pieces.add(row, plan, *piece, None)
    if DOCUMENTS not in plans:
        assert found is None
        return
    assert found is not None
    assert equal(found, pieces.rows())


def equal(one: VirtualRows, other: VirtualRows) -> bool:
    for name, value in vars(one).items():
        wanted = vars(other)[name]
        pairs = (
            zip(vars(value).values(), vars(wanted).values(), strict=True) if name == "rerotated" else [(value, wanted)]
        )
        for found, right in pairs:
            assert np.array_equal(found, right) and np.shape(found) == np.shape(right), name
    return True
