"""Virtual rows: a paged causal kernel that knows nothing of star gives star's answer over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from attention_backends.star.metadata import virtual_metadata
from attention_backends.star.reference import masked_attention, star_mask
from attention_backends.star.rows import split_rows
from scheduler.plan import StarPlan

PAGE, HEADS, KV_HEADS, SIZE = 4, 2, 1, 8


def batch_metadata(query_lens: list[int], seq_lens: list[int], columns: int, **fields) -> CommonAttentionMetadata:
    """A batch whose row r owns pages r * columns and on."""
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
    """Varlen causal attention aligned bottom-right over a block table, one row at a time."""
    out = torch.empty_like(query)
    for row in range(common.num_reqs):
        first, last = common.query_start_loc[row : row + 2].tolist()
        length = int(common.seq_lens[row])
        pages = common.block_table_tensor[row, : -(-length // PAGE)].long()
        key = key_pages[pages].flatten(0, 1)[:length]
        value = value_pages[pages].flatten(0, 1)[:length]
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
        block_size = PAGE * draw(st.integers(1, 5))
        sizes = st.integers(0, block_size // PAGE).map(lambda pages: pages * PAGE)
        plan = StarPlan(block_size, draw(sizes), draw(sizes), draw(st.integers(0, num_tokens)), num_tokens)
        rows.append((draw(st.sampled_from([plan, plan, None])), start, num_tokens))
    return rows


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(0, 2), st.integers(0, 2**31))
def test_paged_causal_attention_over_virtual_rows_is_star_attention(rows, padding, seed):
    """Mixed batches, any cut, any sizes; padding rows at the end as CUDA graphs have them."""
    torch.manual_seed(seed)
    columns = 70 // PAGE + 1
    num_rows = len(rows) + padding
    query_lens = [end - start for _, start, end in rows] + [0] * padding
    common = batch_metadata(query_lens, [end for _, _, end in rows] + [0] * padding, columns)
    virtual = split_rows([plan for plan, _, _ in rows] + [None] * padding, query_lens, common.seq_lens.tolist(), PAGE)
    query = torch.randn(sum(query_lens), HEADS, SIZE, dtype=torch.float64)
    key_pages, value_pages = torch.randn(2, num_rows * columns, PAGE, KV_HEADS, SIZE, dtype=torch.float64)
    rewritten = common if virtual is None else virtual_metadata(common, virtual)
    out = paged_causal(query, key_pages, value_pages, rewritten)
    for row, (plan, start, end) in enumerate(rows):
        numbers = plan or StarPlan(PAGE, 0, 0, 0, end)
        mask = star_mask(
            end,
            block_size=numbers.block_size,
            anchor_size=numbers.anchor_size,
            overlap_size=numbers.overlap_size,
            context_end=numbers.context_end,
        )[start:]
        pages = common.block_table_tensor[row].long()
        key, value = key_pages[pages].flatten(0, 1)[:end], value_pages[pages].flatten(0, 1)[:end]
        first, last = common.query_start_loc[row : row + 2].tolist()
        want = masked_attention(query[first:last], key, value, mask, SIZE**-0.5)[0]
        torch.testing.assert_close(out[first:last], want, rtol=1e-10, atol=1e-10)


@settings(deadline=None)
@given(batches())
def test_counts_are_those_of_the_rows(rows):
    query_lens = [end - start for _, start, end in rows]
    virtual = split_rows([plan for plan, _, _ in rows], query_lens, [end for _, _, end in rows], PAGE)
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


def test_dense_and_decode_batches_are_left_alone():
    plan = StarPlan(8, 8, 0, 30, 40)
    assert split_rows([None, None], [5, 1], [5, 9], PAGE) is None
    assert split_rows([plan, plan], [1, 10], [41, 40], PAGE) is None  # decode, and the query chunk
    assert split_rows([plan], [11], [40], PAGE) is not None


def test_every_field_follows_its_row():
    plan = StarPlan(8, 8, 0, 30, 40)
    common = batch_metadata([1, 20, 3], [9, 20, 3], columns=12)
    rows = split_rows([None, plan, None], [1, 20, 3], [9, 20, 3], PAGE)
    virtual = virtual_metadata(common, rows)
    assert rows.source.tolist() == [0, 1, 1, 1, 2]
    assert virtual.query_start_loc.tolist() == [0, 1, 9, 17, 21, 24]
    assert virtual.seq_lens.tolist() == virtual.seq_lens_cpu_upper_bound.tolist() == [9, 8, 16, 12, 3]
    assert virtual.block_table_tensor[3, :3].tolist() == [12, 13, 16]  # anchor pages, then block 2's first
    assert (virtual.num_reqs, virtual.max_query_len, virtual.max_seq_len) == (5, 8, 16)
    assert virtual.is_prefilling.tolist() == [False, True, True, True, True]
    assert virtual.req_idx.tolist() == [40, 41, 41, 41, 42]
    assert virtual.slot_mapping is common.slot_mapping
    assert virtual.compute_num_computed_tokens().tolist() == [8, 0, 8, 8, 0]


def test_decode_rows_keep_the_device_length():
    """Under async scheduling the host's length of a decode row is only an upper bound."""
    plan = StarPlan(8, 8, 0, 30, 40)
    upper = torch.tensor([12, 20], dtype=torch.int32)
    common = batch_metadata([1, 20], [9, 20], columns=12, seq_lens_cpu_upper_bound=upper)
    rows = split_rows([None, plan], [1, 20], upper.tolist(), PAGE)
    assert virtual_metadata(common, rows).seq_lens.tolist() == [9, 8, 16, 12]


@pytest.mark.parametrize("field", ["dcp_local_seq_lens", "encoder_seq_lens", "rswa_prefix_lens"])
def test_fields_without_a_split_are_refused(field):
    plan = StarPlan(8, 8, 0, 30, 40)
    common = batch_metadata([20], [20], columns=12, **{field: torch.tensor([20])})
    with pytest.raises(RuntimeError, match=field):
        virtual_metadata(common, split_rows([plan], [20], [20], PAGE))
