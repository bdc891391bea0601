"""Start SMG or vllm-router in front of servers, wait until they know these, and stop them."""

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

SMG, VLLM_ROUTER = "smg", "vllm-router"
MODULES = {SMG: "smg", VLLM_ROUTER: "vllm_router"}
START_SECONDS = 60.0


def is_installed(gateway: str) -> bool:
    """Whether the environment has a gateway; on some platforms there is no wheel of it."""
    return find_spec(MODULES[gateway]) is not None


def command(gateway: str, servers: Sequence[Server], policy: str, port: int, metrics_port: int) -> list[str]:
    """The command line of a gateway: SMG calls the servers over gRPC, and vllm-router over HTTP."""
    of_servers = [server.http for server in servers]
    start = ["vllm_router.launch_router"]
    if gateway == SMG:
        of_servers = [f"grpc://{server.grpc}" for server in servers]
        start = ["smg", "launch", "--model-path", servers[0].model, "--health-check-interval-secs", "2"]
    return [
        *(
            sys.executable,
            "-m",
            *start,
            "--worker-urls",
            *of_servers,
            "--policy",
            policy,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ),
        *("--prometheus-port", str(metrics_port), "--log-level", "warn" if gateway == SMG else "warning"),
    ]


@contextlib.contextmanager
def gateway_before(
    gateway: str, servers: Sequence[Server], log: Path, policy: str = "round_robin", options: Sequence[str] = ()
) -> Iterator[str]:
    """The address of a gateway, which runs for the duration of the block.

    Args:
        gateway: SMG or VLLM_ROUTER.
        servers: that run and are healthy.
        log: file for its output.
        policy: of the gateway.
        options: further ones.

    Raises:
        RuntimeError: it ends, or does not answer within START_SECONDS.
    """
    port, metrics_port = free_ports(0, 0)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command(gateway, servers, policy, port, metrics_port), *options],
            stdout=output,
            stderr=output,
            env={"no_proxy": "127.0.0.1", **os.environ},
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_models(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_models(process: subprocess.Popen, url: str, log: Path) -> None:
    """Wait until a gateway lists a model, which it has from a server (raises RuntimeError)."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/v1/models") as models:
            if b'"id"' in models.read():
                return
        time.sleep(0.2)
    raise RuntimeError(f"the gateway does not answer; its log ends with:\n{log.read_text(errors='replace')[-2000:]}")
