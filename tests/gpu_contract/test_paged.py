"""Starling's own backends (``gpu_attention``) under vLLM's builders, wrapped: their Triton kernels run, interpreted."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("job", "cases", "facts"),
    [
        ("paged_triton", 20, ("fp8", "one_token_rows", "windowed", "padded", "split_pages")),
        ("paged_triton_heads", 12, ("calls_on_some_heads",)),
        ("paged_triton_own", 12, ("rerotated",)),
        ("paged_xformers", 20, ("star_steps", "one_token_rows", "padded", "split_pages")),
    ],
)
def test_the_backend_computes_the_explicit_mask(check_job, job, cases, facts):
    check_job(job, cases, facts)
