"""The Triton kernel of Attamba's scan, without a GPU: interpreted against float64, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.parity.harness import ROOT, v2_env


@pytest.mark.parametrize("job", ["interpret", "compile"])
def test_kernel(job):
    env = os.environ | v2_env() | ({} if job == "interpret" else {"TRITON_INTERPRET": "0"})
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.attamba_scan_job", job],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-4000:]
