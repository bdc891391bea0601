"""Documents on vLLM's GPU backends, wrapped: the right keys are met at the right distance."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("job", "cases"),
    [("fa3_own", 60), ("flashinfer_sm100_own", 60), ("triton_own", 24)],
)
def test_the_wrapped_backend_meets_keys_at_their_true_distance(check_job, job, cases):
    check_job(job, cases, ("one_token_rows", "padded", "split_pages", "rerotated", "rerotated_beside_others"))
