"""Benchmarks run their smallest round, so that the figures of the docs can be made again.

Of those that take longer, `make types` finds names and arguments that do not exist, and
tests/unit/benchmarks/test_run.py imports them and looks for their options.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from benchmarks import run
from benchmarks.report import RESULTS

SMALLEST = {
    "host_step": "--rows 2 --documents 4 --rounds 2",
    "agents": "--sessions 1 --settings Starling",
    "attamba.capacity": "--lengths 1024 --chunks 4",
}
"""Benchmark -> arguments of a round of seconds."""

ENGINES = "its prompts, engines or servers take minutes at its smallest"
MODEL = "it measures a real model for minutes or hours"
LEFT_OUT = {
    **dict.fromkeys(
        (
            *("star_ttft", "dense_cost", "block_reuse", "block_positions", "library", "routing", "fairness", "goodput"),
            *("retrieval", "kernels.cpu_attention", "kernels.cpu_kernels", "kv_shift.cost", "attamba.speed"),
            *("replicas.ttft", "replicas.model", "replicas.shards", "soak", "adapter_cost", "front_overhead"),
        ),
        ENGINES,
    ),
    **dict.fromkeys(("adapter", "accuracy", "dense_heads", "approximations"), MODEL),
    **dict.fromkeys(("default_plan", "rag"), "it needs the model of 0.5B parameters (`make eval-model`)"),
    **dict.fromkeys(("attamba.quality", "adapter_options"), "it trains models"),
    "lm_eval": "it needs lm_eval and the model of 0.5B parameters",
    "load_tools": "it sends long prompts for minutes; test_load_tools.py runs its tools with short ones",
    "llama_cpp": "it needs llama.cpp (`make bench-llama`)",
    "kernels.gpu_kernels": "it needs a GPU",
}
"""Benchmark -> why its smallest round is not run here."""

PAGES = [run.ROOT / "README.md", *sorted((run.ROOT / "docs").glob("*.md"))]


def named() -> set[str]:
    """The benchmarks that the docs name: those of commands."""
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return set(re.findall(r"python -m benchmarks\.([\w.]*\w)", texts))


def test_each_benchmark_that_the_docs_name_is_run_or_left_out_for_a_reason():
    assert len(named()) > 10
    assert named() <= run.FULL.keys() == SMALLEST.keys() | LEFT_OUT.keys()
    assert not SMALLEST.keys() & LEFT_OUT.keys()


@pytest.mark.parametrize("name", SMALLEST)
def test_its_smallest_round(tmp_path, name):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALLEST[name].split()]
    environment = os.environ | {"BENCHMARKS_OUT": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, cwd=run.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert list(tmp_path.glob("*.json")), "it has written its figures"
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
