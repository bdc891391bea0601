"""Starling's own backends (``gpu_attention``) under vLLM's builders, wrapped: the Triton kernels run, interpreted."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("job", "cases", "facts"),
    [
        ("paged_triton", 32, ("fp8", "one_token_rows", "windowed", "padded", "split_pages")),
        ("paged_triton_heads", 20, ("calls_on_some_heads",)),
        ("paged_triton_own", 24, ("turned",)),
    ],
)
def test_the_backend_computes_the_explicit_mask(check_job, job, cases, facts):
    check_job(job, cases, facts)
