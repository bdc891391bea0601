"""`starling selftest --quick` as a user runs it on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from starling.lab.machine import has_gpu
from starling.lab.selftest.engine_checks import settings
from tests.forks import COUNTERS
from tests.parity.harness import cores

pytestmark = pytest.mark.engine

PASSED = [
    "kernel: CPU op",
    "kernel: plain torch",
    "kernel: CPU op, cache above 2^31 elements",
    "star rows: CPU_ATTN, vLLM's op",
    "star rows: CPU_ATTN, Starling's op",
    *(
        f"{settings(gpu=False, quick=True)[0].name()}: {check}"
        for check in (
            "engines start",
            "star off equals plain vLLM",
            "one star block equals dense",
            "star against the mask",
            "star beside decodes",
            "preemption",
            "prefix hit",
            "reuse of star blocks",
            "dense heads against the masks",
            "dense heads beside a prompt without",
            "documents",
            "documents in another order",
        )
    ),
    "as served: documents with an adapter",
    "as served: documents from a library",
    "speed: a token, activated",
    "speed: first token behind 16 documents in another order",
    *(f"speed: a token behind 16 documents, {count} requests" for count in (1, 4)),
]
SKIPPED = [
    "kernel: Triton",
    "kernel: xformers",
    "kernel: Triton, cache above 2^31 elements",
    "two GPUs: TP=2 equals TP=1",
    "two GPUs: TP=2: documents with an adapter",
    "two GPUs: TP=2: documents from a library",
    "two GPUs: moved pages are equal",
    *(f"speed: steps in full CUDA graphs, {kind}" for kind in ("star", "documents")),
    "speed: memory of documents beside a decode",
    "speed: memory of the GPU",
]


@pytest.mark.skipif(has_gpu(), reason="the CPU part runs on machines without a GPU")
def test_the_cpu_part_passes(tmp_path):
    path = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name not in COUNTERS}
    with cores(1) as bound:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "starling.engine_ext.serving.cli.main",
                "selftest",
                "--quick",
                "--report",
                str(tmp_path),
            ],
            capture_output=True,
            text=True,
            timeout=1800,
            env=environment | {"VLLM_CPU_OMP_THREADS_BIND": bound, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 2, done.stdout + done.stderr
    report = json.loads(path.read_text())
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert verdicts == dict.fromkeys(PASSED, "PASS") | dict.fromkeys(SKIPPED, "SKIP")
    (engine,) = report["engines"].values()
    assert (engine["runner"], engine["backend"], engine["graphs"]) == ("V1", "CPU_ATTN", "eager")
    assert re.fullmatch(r"\d\d+ NONE", engine["steps by graphs"])
    assert f"{len(PASSED)} PASS, 0 FAIL, {len(SKIPPED)} SKIP" in done.stdout
