"""The reference itself, against loops over one query, head and key at a time."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings

from starling.attention_backends.kernels.contract import Layout
from starling.attention_backends.kernels.reference import paged_attention
from tests.kernels.cases import Case, cases


def naive(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract with Python's floats, without matrices, masks or page views."""
    tensors = case.tensors()
    query, table = tensors["query"].double(), tensors["block_table"].tolist()
    out = torch.zeros(*query.shape[:2], case.value_size, dtype=torch.float64)
    lse = torch.full(query.shape[:2], -math.inf, dtype=torch.float64)
    token = 0
    for row, (queries, keys) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        for index in range(queries):
            last = keys - 1 - (queries - 1 - index) // case.queries_per_key if case.causal else keys - 1
            seen = [k for k in range(keys) if k <= last and (case.window is None or k > last - case.window)]
            for head in range(query.shape[1]):
                total, weighted = 0.0, torch.zeros(case.value_size, dtype=torch.float64)
                for k in seen:
                    page_id, slot = table[row][k // case.page_size], k % case.page_size
                    key, value = cell(case, tensors, page_id, slot, head // case.group)
                    score = case.arguments()["scale"] * torch.dot(query[token, head], key).item()
                    score = case.softcap * math.tanh(score / case.softcap) if case.softcap else score
                    total += math.exp(score)
                    weighted += math.exp(score) * value
                if seen:
                    out[token, head], lse[token, head] = weighted / total, math.log(total)
            token += 1
    return out, lse


def cell(case: Case, tensors: dict[str, torch.Tensor], page_id: int, slot: int, head: int):
    """One key and one value. In the CPU layout, element d of key t of a page and head is number d * page_size + t."""
    keys, values = tensors["key_cache"], tensors["value_cache"]
    if case.layout is Layout.PAGES:
        return keys[page_id, slot, head].double(), values[page_id, slot, head].double()
    return keys[page_id, head].flatten()[slot :: case.page_size].double(), values[page_id, head, slot].double()


@given(cases(group=2, page_size=16, key_size=32))
@settings(max_examples=15, deadline=None)
def test_reference_is_the_definition(case):
    out, lse = case.exact(paged_attention)
    expected, expected_lse = naive(case)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)
