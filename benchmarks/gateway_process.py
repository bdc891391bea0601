"""Start SMG, vllm-router or examples/document_router.py in front of servers, and stop them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from examples.server import Server, free_ports

SMG, VLLM_ROUTER, DOCUMENT_ROUTER = "smg", "vllm-router", "examples/document_router.py"
MODULES = {SMG: "smg", VLLM_ROUTER: "vllm_router"}
READY = {SMG: ("/v1/models", b'"id"'), VLLM_ROUTER: ("/v1/models", b'"id"'), DOCUMENT_ROUTER: ("/health", b"")}
"""Where a gateway says that it is ready, and what: those of a package list a model, which they have from a server."""

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 60.0


def is_installed(gateway: str) -> bool:
    """Return whether the environment has a gateway; on some platforms there is no wheel of it."""
    return gateway not in MODULES or find_spec(MODULES[gateway]) is not None


def command(gateway: str, servers: Sequence[Server], policy: str) -> list[str]:
    """Return the command line of a gateway: SMG calls the servers over gRPC, and the others over HTTP."""
    (port,) = free_ports(0)
    address = ["--host", "127.0.0.1", "--port", str(port)]
    urls = [server.http for server in servers]
    if gateway == DOCUMENT_ROUTER:
        return [sys.executable, str(ROOT / DOCUMENT_ROUTER), *urls, *address]
    start = ["vllm_router.launch_router", "--log-level", "warning"]
    if gateway == SMG:
        urls = [f"grpc://{server.grpc}" for server in servers]
        start = ["smg", "launch", "--model-path", servers[0].model, "--health-check-interval-secs", "2"]
        start += ["--log-level", "warn"]
    (metrics_port,) = free_ports(0)
    options = ["--policy", policy, "--prometheus-port", str(metrics_port)]
    return [sys.executable, "-m", *start, "--worker-urls", *urls, *options, *address]


@contextlib.contextmanager
def gateway_before(gateway: str, servers: Sequence[Server], log: Path, policy: str = "round_robin") -> Iterator[str]:
    """Run a gateway for the duration of the block and yield its address.

    Args:
        gateway: SMG, VLLM_ROUTER or DOCUMENT_ROUTER.
        servers: servers that run and are healthy.
        log: file for its output.
        policy: policy of a gateway that has several.

    Raises:
        RuntimeError: it ends, or does not answer within START_SECONDS.
    """
    arguments = command(gateway, servers, policy)
    environment = {"no_proxy": "127.0.0.1", **os.environ}
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment, process_group=0)
    url = f"http://127.0.0.1:{arguments[-1]}"
    try:
        wait_until_ready(process, url, *READY[gateway], log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen, url: str, path: str, says: bytes, log: Path) -> None:
    """Wait until a gateway says that it is ready (raises RuntimeError)."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url + path) as answer:
            if says in answer.read():
                return
        time.sleep(0.2)
    raise RuntimeError(f"the gateway does not answer; its log ends with:\n{log.read_text(errors='replace')[-2000:]}")
