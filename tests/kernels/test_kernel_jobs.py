"""Triton kernels of the model families, without a GPU: interpreted against a reference, compiled, and counted."""

from __future__ import annotations

import pytest

from tests.forks import run_in_fork
from tests.parity.harness import v2_env

JOBS = ("kv_shift_job", "attamba_scan_job", "attamba_decode_job", "ranges_job")
MODULES = tuple(f"tests.kernels.{job}" for job in JOBS)


@pytest.mark.parametrize("job", ["interpret", "wide", "compile", "steps"])
@pytest.mark.parametrize("kernels", JOBS)
def test_kernels(kernels, job):
    env = v2_env() | ({"TRITON_INTERPRET": "0"} if job in ("compile", "steps") else {})
    done = run_in_fork(f"tests.kernels.{kernels}:main", job, imports=MODULES, before=env, seconds=900)
    assert done.returncode == 0, done.stderr[-4000:]
