"""A signal to `starling serve` during its start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.server import ENVIRONMENT, free_ports

pytestmark = pytest.mark.e2e

GRPC = ["--grpc-port", "0"]


@pytest.mark.parametrize(
    ("moment", "options"),
    [
        ("Initializing a V1 LLM engine", GRPC),
        ("reserved_cpus", GRPC),
        ("Initializing a V1 LLM engine", ["--data-parallel-size", "2"]),
    ],
    ids=["engine", "worker", "replicas"],
)
def test_sigterm_during_the_start_exits_with_130(tmp_path, moment, options):
    """The signal comes when ``moment`` is in the log, which the process of the engine or of its worker writes."""
    model = make_tiny_llama(tmp_path / "tiny")
    command = [Path(sys.executable).with_name("starling"), "serve", model, "--enforce-eager"]
    command += ["--port", str(*free_ports(0)), *options]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT | os.environ, process_group=0)
    children = []
    try:
        deadline = time.monotonic() + 600
        while moment not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, f"the log has no {moment!r}"
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 130
        _, alive = psutil.wait_procs(children, timeout=300)
        assert not alive
    finally:
        for each in (process, *children):
            if each.is_running() if isinstance(each, psutil.Process) else each.poll() is None:
                each.kill()
