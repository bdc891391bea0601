"""vLLM's FlashAttention builder and impl, wrapped: FA2 (sm_80), FA3 (sm_90) and FA4 (sm_100) emulated."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(("job", "cases"), [("fa2", 150), ("fa3", 200), ("fa4", 100)])
def test_the_wrapped_backend_computes_the_explicit_mask(check_job, job, cases):
    check_job(job, cases)
