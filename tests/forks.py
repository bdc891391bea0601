"""Jobs in processes of their own that need not import vLLM: forks of one process for each environment and import."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUNTERS = ("PROMETHEUS_MULTIPROC_DIR", "STARLING_METRICS_DIR")  # set in this process if it has made a scheduler
# One thread: a process with more of them can not fork safely, and the other core has other work.
SETTINGS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
SETTINGS |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
INHERITED = {name: value for name, value in os.environ.items() if name not in COUNTERS} | SETTINGS
"""As it was when this module was imported: what a test sets while a server starts is not for all later jobs."""


def run_in_fork(
    function: str,
    *argv: str,
    imports: tuple[str, ...],
    before: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    seconds: int = 1800,
) -> subprocess.CompletedProcess[str]:
    """Run module:function, whose result is the exit code, as the program of a process.

    Args:
        argv: the arguments, `sys.argv[1:]`.
        imports: modules, or module:attribute, that are imported once for all jobs with the same ``before``.
        before: environment from before the imports on, beside that of this process.
        env: environment of this job alone.
        seconds: the time limit.
    """
    server = fork_server(imports, frozenset((before or {}).items()))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        request = {"function": function, "argv": argv, "env": dict(env or {}), "seconds": seconds, **paths}
        print(json.dumps(request), file=server.stdin, flush=True)
        code = server.stdout.readline().strip()
        assert code, "the fork server has ended"
        output = {name: Path(path).read_text(errors="replace") for name, path in paths.items()}
    return subprocess.CompletedProcess(argv, int(code), **output)


@functools.cache
def fork_server(imports: tuple[str, ...], env: frozenset[tuple[str, str]]) -> subprocess.Popen[str]:
    """Start a fork_server.py with these imports and additional environment. It ends with this process."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.fork_server", *imports],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=INHERITED | dict(env),
    )
