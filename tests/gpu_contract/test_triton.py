"""vLLM's Triton builder, impl and kernel, wrapped: the kernel itself runs, interpreted."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(("job", "cases"), [("triton", 32)])
def test_the_wrapped_backend_computes_the_explicit_mask(check_job, job, cases):
    check_job(job, cases)
