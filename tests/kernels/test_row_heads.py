"""Rows that compute some KV heads only: each head is that of a plain call with its own rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.attention_backends.kernels import reference
from starling.attention_backends.kernels.contract import Layout
from starling.attention_backends.kernels.cpu import fallback
from starling.attention_backends.kernels.cpu import paged_op as cpu
from starling.attention_backends.kernels.triton import paged as triton
from tests.kernels.cases import Case

IMPLEMENTATIONS = pytest.mark.parametrize("module", [reference, cpu, fallback], ids=["reference", "op", "fallback"])


@dataclass(frozen=True)
class Passes:
    """A call whose rows go over ``tokens`` query tokens several times; ``owners`` has the pass that computes a head."""

    case: Case
    tokens: int
    owners: tuple[int, ...]

    @property
    def number_of_rows(self) -> torch.Tensor:
        """(R,) the pass of each row."""
        return self.case.tensors()["query_start_loc"][:-1] // self.tokens

    @property
    def query(self) -> torch.Tensor:
        return self.case.tensors()["query"][: self.tokens].contiguous()

    def run(self, implementation) -> tuple[torch.Tensor, torch.Tensor]:
        row_heads = self.number_of_rows[:, None] == torch.tensor(self.owners)[None]
        return self.case.run(implementation, query=self.query, row_heads=row_heads)

    def plain(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of all heads by the rows of one pass."""
        rows, tensors = torch.nonzero(self.number_of_rows == number)[:, 0], self.case.tensors()
        starts = tensors["query_start_loc"][rows[0] : rows[-1] + 2]
        return self.case.run(
            reference.paged_attention,
            query=self.query,
            block_table=tensors["block_table"][rows],
            query_start_loc=starts - starts[0],
            seq_lens=tensors["seq_lens"][rows],
        )


@st.composite
def passes(draw: st.DrawFn) -> Passes:
    tokens, number, lens = draw(st.integers(1, 40)), draw(st.integers(2, 3)), []
    for _ in range(number):
        borders = sorted(draw(st.sets(st.integers(1, tokens), max_size=3)) | {0, tokens})
        lens += [(stop - start, stop - start + draw(st.integers(0, 60))) for start, stop in pairwise(borders)]
    query_lens, seq_lens = zip(*lens, strict=True)
    kv_heads, layout = draw(st.integers(1, 4)), draw(st.sampled_from(Layout))
    case = Case(
        query_lens, seq_lens, kv_heads, draw(st.sampled_from([1, 3])), layout=layout, seed=draw(st.integers(0, 9))
    )
    owners = st.lists(st.integers(0, number - 1), min_size=kv_heads, max_size=kv_heads)
    return Passes(case, tokens, tuple(draw(owners)))


def check(drawn: Passes, module) -> None:
    out, lse = drawn.run(module.paged_attention)
    for number in set(drawn.owners):
        expected, expected_lse = drawn.plain(number)
        heads = (torch.tensor(drawn.owners) == number).repeat_interleave(drawn.case.group)
        torch.testing.assert_close(out[:, heads], expected[:, heads], rtol=0, atol=2e-5)
        torch.testing.assert_close(lse[:, heads], expected_lse[:, heads], rtol=0, atol=1e-5)


@IMPLEMENTATIONS
@given(drawn=passes())
@settings(max_examples=25, deadline=None)
def test_each_head_is_that_of_its_rows(module, drawn):
    check(drawn, module)


def test_few_rows_of_many_keys_are_shared_among_threads():
    """With two threads the op divides the keys of such rows, and merges the parts of each head."""
    case = Case((1, 1), (3000, 1200), kv_heads=2, group=2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(Passes(case, 1, (0, 1)), cpu)
    finally:
        torch.set_num_threads(before)


def test_row_heads_are_a_bool_for_each_row_and_head():
    case = Case((2, 2), (9, 9))
    for heads in (torch.ones(2, 2), torch.ones(1, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"row_heads \(.*: a bool for each of 2 rows and 2 KV heads"):
            case.operands(row_heads=heads)


def test_rows_that_end_within_the_query_are_refused():
    case = Case((2, 1), (9, 9))
    changes = {"query": case.tensors()["query"][:2].contiguous(), "row_heads": torch.ones(2, 2, dtype=torch.bool)}
    with pytest.raises(ValueError, match="ends at 3, which is no multiple of the 2 query tokens"):
        case.run(cpu.paged_attention, **changes)


def test_a_kernel_whose_rows_compute_all_heads_says_so():
    operands = Case((2,), (9,), layout=Layout.PAGES, dtype=torch.float16).operands(
        row_heads=torch.ones(1, 2, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match="row_heads: each row of the Triton kernels computes all heads"):
        triton.paged_attention(operands)
