"""Heads that see everything beside heads of star blocks, on vLLM's GPU backends, wrapped: one call for each run.

Each call is held against its kernel's contract: FlashAttention 3's scheduler metadata and FlashInfer's plans are those
of the call's rows and heads, and no plan is overwritten before its call. Each head's result is that of its own mask.
"""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("job", "cases"),
    [
        ("fa2_heads", 60),
        ("fa3_heads", 100),
        ("fa4_heads", 60),
        ("flashinfer_sm80_heads", 60),
        ("flashinfer_sm90_heads", 60),
        ("flashinfer_sm100_heads", 60),
        ("triton_heads", 20),
    ],
)
def test_each_head_of_the_wrapped_backend_has_its_mask_in_one_call_for_each_run_of_heads(check_job, job, cases):
    facts = ("windowed", "padded", "split_pages", "all_heads_dense", "calls_on_some_heads", "calls_on_three_kinds")
    check_job(job, cases, facts)
