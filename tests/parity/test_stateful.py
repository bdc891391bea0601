"""Random sequences of requests, aborts, preemptions and resets on a real engine: each answer is the reference's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.random_llama import make_random_llama
from tests.forks import COUNTERS, ROOT
from tests.parity.harness import TINY, cores
from tests.stateful import Length

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("library", ["-", ":1MiB"], ids=["no library", "small library"])
def test_answers_are_those_of_the_reference_and_no_request_or_page_is_lost(tmp_path, pytestconfig, library):
    model = make_random_llama(tmp_path / "tiny", **TINY)
    length = Length.of(pytestconfig)
    arguments = ["-" if value is None else str(value) for value in (length.minutes, length.seed)]
    inherited = {name: value for name, value in os.environ.items() if name not in COUNTERS}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with cores(1) as bound:
        done = subprocess.run(
            [sys.executable, "-m", "tests.parity.stateful_job", str(model), library, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=1800 + 60 * (length.minutes or 0),
            env=inherited | env | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": bound},
        )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
