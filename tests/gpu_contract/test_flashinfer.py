"""vLLM's FlashInfer builder and impl, wrapped: native wrappers (sm_80), XQA (sm_90, 120), TRT-LLM (100), emulated."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("job", "cases"),
    [("flashinfer_sm80", 100), ("flashinfer_sm90", 100), ("flashinfer_sm100", 100), ("flashinfer_sm120", 60)],
)
def test_the_wrapped_backend_computes_the_explicit_mask(check_job, job, cases):
    check_job(job, cases)
