"""Jobs and servers in processes of their own that need not import vLLM: forks of a process that has done so.

There is one such process for each environment and import of jobs, and one for the servers.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

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
    env: Mapping[str, str | None] | None = None,
    seconds: int = 1800,
) -> subprocess.CompletedProcess[str]:
    """Run module:function, whose result is the exit code, as the program of a process.

    Args:
        argv: the arguments, `sys.argv[1:]`.
        imports: modules, or module:attribute, that are imported once for all jobs with the same ``before``.
        before: environment from before the imports on, beside that of this process.
        env: environment of this job alone; None: not set.
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


FORK_SHIM = ROOT / "tests" / "fork_shim"
PROGRAMS = {"starling": "starling.engine_ext.serving.cli.main:main", "vllm": "vllm.entrypoints.cli.main:main"}
PRELOADED = "tests.preloaded"


def path_with(folder: Path) -> str:
    """This process's PYTHONPATH, with a folder before it."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def forking() -> dict[str, str]:
    """The environment in which vLLM's processes fork (tests/fork_shim), and log-probabilities' ranks don't compile.

    vLLM compiles these at their first use, which takes 13 s.
    """
    return {"TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": path_with(FORK_SHIM)}


def start_program(command: Sequence[str | Path], **options: object) -> subprocess.Popen | ForkedServer:
    """``subprocess.Popen``, in whose place a command of one of ``PROGRAMS`` is a fork."""
    fork = Path(command[0]).name in PROGRAMS
    return ForkedServer(command, **options) if fork else subprocess.Popen(command, **options)


class ForkedServer:
    """What a test needs of ``subprocess.Popen``, of a fork of a process that has imported vLLM."""

    def __init__(
        self, command: Sequence[str | Path], *, stdout: IO, stderr: IO, env: Mapping[str, str], process_group: int
    ) -> None:
        self.args = list(map(str, command))
        self.returncode: int | None = None
        function = PROGRAMS[Path(self.args[0]).name]
        request = {"function": function, "argv": self.args, "env": dict(env), "cwd": os.getcwd()}
        self.connection, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(server_forks(), [b"+"], [theirs.fileno(), stdout.fileno(), stderr.fileno()])
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        self.replies = self.connection.makefile()
        self.pid = int(self.replies.readline())

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, at the end of the process (raises TimeoutExpired)."""
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self.replies.readline())
            self.replies.close()
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code; None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def server_forks() -> socket.socket:
    """Start fork_servers.py, which ends with this process; returns the other end of its standard input."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-W", "ignore", "-m", "tests.fork_servers", PRELOADED]
        subprocess.Popen(command, stdin=theirs, cwd=ROOT, env=INHERITED | forking())
    return ours
