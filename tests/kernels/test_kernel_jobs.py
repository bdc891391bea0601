"""Triton kernels of the model families, without a GPU: interpreted against a reference, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.parity.harness import ROOT, v2_env


@pytest.mark.parametrize("job", ["interpret", "wide", "compile"])
@pytest.mark.parametrize("kernels", ["kv_shift_job", "attamba_scan_job", "attamba_decode_job"])
def test_kernels(kernels, job):
    env = os.environ | v2_env() | ({"TRITON_INTERPRET": "0"} if job == "compile" else {})
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{kernels}", job],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-4000:]
