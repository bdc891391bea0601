"""xformers: when it is usable, whether its biases give the star mask, and its paged kernel's numbers."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton

from starling.attention_backends.kernels.contract import Layout, Operands
from starling.attention_backends.kernels.xformers_probe import Facts, gather_facts, unavailable_reason
from starling.attention_backends.star.metadata import virtual_block_table
from starling.attention_backends.star.rows import split_rows
from starling.lab.selftest.masks import star_mask
from starling.scheduler.planning.plan import StarPlan
from tests.kernels.cases import Case
from tests.kernels.xformers.jobs import measure_xformers, start_xformers_worker

PAGE_SIZE = 16
USABLE = Facts(xformers="0.0.35", triton="3.7.1", capability=(9, 0), paged_op=True)
# float16 only: in xformers' kernel, the interpreter multiplies the bits of bfloat16.
MIXED = Case((5, 1, 3, 33, 0, 4), (70, 90, 0, 33, 9, 3), 2, 2, 64, 64, layout=Layout.PAGES, dtype=torch.float16)
CASES = {
    "mixed": (MIXED, "pages"),
    "not causal": (replace(MIXED, causal=False), "pages"),
    "decode": (replace(MIXED, query_lens=(1, 1, 0, 1), seq_lens=(300, 1, 5, 0), group=4, page_size=64), "pages"),
    "one head a KV head, scales": (replace(MIXED, group=1, k_scale=0.5, v_scale=2.0, page_size=48), "pages"),
    "K and V of a page side by side": (MIXED, "gaps"),
}


def needs_xformers() -> None:
    pytest.importorskip("xformers", reason="xformers is not installed: the extra `xformers`")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"xformers": None}, "not installed"),
        ({"xformers": "0.0.36"}, "0.0.36 is installed, 0.0.35 is the release"),
        ({"triton": None}, "Triton is not installed"),
        ({"triton": "3.9.0"}, "Triton 3.9.0 has no make_block_ptr"),
        ({"triton": "3.10.1"}, "Triton 3.10.1 has no make_block_ptr"),
        ({"capability": None}, "no CUDA device"),
        ({"capability": (7, 5)}, "compute capability (7, 5) is below"),
        ({"paged_op": False}, "has no xformers/ops/fmha/triton_splitk.py"),
    ],
)
def test_unavailable_reason(change: dict, reason: str | None):
    actual = unavailable_reason(replace(USABLE, **change))
    assert actual == reason or reason in actual


def test_facts_are_those_of_this_process():
    facts = gather_facts()
    assert facts.triton == triton.__version__
    assert (facts.capability is None) == (not torch.cuda.is_available())
    assert facts.paged_op == (facts.xformers is not None) == (importlib.util.find_spec("xformers") is not None)


@pytest.mark.parametrize(
    ("plan", "start", "end"),
    [
        (StarPlan(48, 16, 0, 160, 170), 0, 170),
        (StarPlan(48, 16, 32, 160, 170), 10, 130),
        (StarPlan(64, 64, 64, 200, 230), 70, 215),
        (StarPlan(32, 0, 0, 100, 120), 33, 90),
        (StarPlan(32, 0, 16, 100, 120), 100, 110),
    ],
    ids=lambda value: "-".join(map(str, vars(value).values())) if isinstance(value, StarPlan) else str(value),
)
def test_biases_of_star_rows_are_the_star_mask(plan: StarPlan, start: int, end: int):
    """A star request between a dense row and a decode row: the keys that each query sees in both parts, by position."""
    needs_xformers()
    from starling.attention_backends.kernels.xformers_paged import context_bias, own_bias, own_lens, own_tokens

    plans, queries, lens = [None, plan, None], [7, end - start, 1], [20, end, 33]
    columns = end // PAGE_SIZE + 2
    spare = 3 * columns
    table = torch.randperm(spare).view(3, columns).int()
    rows = split_rows(plans, queries, lens, PAGE_SIZE)
    if rows is not None:
        virtual = virtual_block_table(table, rows)
        queries, lens = rows.query_lens.tolist(), rows.seq_lens.tolist()
        source = rows.source
    else:
        virtual, source = table.clone(), np.arange(3)
    past_end = torch.arange(columns) >= -(-torch.tensor(lens)[:, None] // PAGE_SIZE)
    virtual[past_end] = spare

    own = own_lens(queries, lens)
    context = [length - tokens for length, tokens in zip(lens, own, strict=True)]
    shape = (sum(queries), len(queries) * columns * PAGE_SIZE)
    counts = (context_bias(queries, context, virtual, PAGE_SIZE).materialize(shape) == 0).int()
    tokens, slots = own_tokens(queries, lens, own, virtual, PAGE_SIZE)
    counts[tokens[:, None], slots] += own_bias(own, torch.device("cpu")).materialize((len(tokens),) * 2) == 0

    position = torch.arange(end)
    place = table[1, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
    starred = torch.from_numpy(np.repeat(source == 1, queries))
    sizes = {name: getattr(plan, name) for name in ("block_size", "anchor_size", "overlap_size", "context_end")}
    assert torch.equal(counts[starred][:, place].bool(), star_mask(end, **sizes)[start:])
    assert counts.max() == 1
    assert counts[starred].sum() == star_mask(end, **sizes)[start:].sum()


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    needs_xformers()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start_xformers_worker) as pool:
        yield pool


@pytest.mark.parametrize(("case", "strides"), CASES.values(), ids=CASES)
def test_two_parts_are_the_reference(worker: ProcessPoolExecutor, case: Case, strides: str):
    errors = worker.submit(measure_xformers, case, strides).result(60)
    assert errors.empty
    assert errors.lse <= 1e-5
    assert errors.rms <= 1.1 * errors.sdpa_rms + errors.ulp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 2, 80, dtype=torch.float16)}, "head sizes 80"),
        ({"query": torch.zeros(1, 2, 64)}, "query torch.float32"),
        ({"window": 5}, "window=5"),
        ({"queries_per_key": 2}, "queries_per_key=2"),
        ({"softcap": 2.0}, "softcap=2.0"),
    ],
)
def test_unsupported_operands_are_refused(change: dict, message: str):
    needs_xformers()
    from starling.attention_backends.kernels.xformers_paged import paged_attention

    query = change.get("query", torch.zeros(1, 2, 64, dtype=torch.float16))
    cache = torch.zeros(2, PAGE_SIZE, 1, query.shape[2], dtype=query.dtype)
    one = torch.ones(1, dtype=torch.int32)
    options = {name: value for name, value in change.items() if name != "query"}
    operands = Operands(query, cache, cache, one[None], torch.tensor([0, 1]).int(), one, scale=1.0, **options)
    with pytest.raises(ValueError, match=message):
        paged_attention(operands)


def test_page_size_that_no_key_block_divides_is_refused():
    needs_xformers()
    from starling.attention_backends.kernels.xformers_paged import paged_op

    with pytest.raises(ValueError, match="pages of 24 tokens"):
        paged_op(24)
