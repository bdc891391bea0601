"""Two hosts on one machine, and one server over both: `sudo make demo-hosts`.

Each host is a network namespace of its own, a veth pair the wire between them. One `starling serve` spans them by
vLLM's multi-node data parallelism: replica 0 and the HTTP server here, replica 1 there (`--headless`). A long prompt is
then prefilled on both, and its KV pages cross the wire. Needs root, and `ip` of iproute2.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from examples.server import ENVIRONMENT, end_on_signals

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
RPC_PORT = "29650"


@dataclass(frozen=True)
class Host:
    """A network namespace with one end of the wire."""

    name: str
    address: str
    core: int  # its replica computes on

    @property
    def wire(self) -> str:
        return f"{self.name}-0"

    def popen(self, command: list[str | Path], log: Path) -> subprocess.Popen:
        """Start a process on this host."""
        settings = {
            "VLLM_HOST_IP": self.address,
            "GLOO_SOCKET_IFNAME": self.wire,
            "VLLM_CPU_OMP_THREADS_BIND": str(self.core),
            # Between real hosts UCX has no other way; on one machine it would take shared memory, wire or not.
            "UCX_TLS": "tcp",
        }
        with log.open("wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdout=output,
                stderr=output,
                env=ENVIRONMENT | os.environ | settings,
                process_group=0,
            )

    def cut(self) -> None:
        """Take this end of the wire down."""
        ip("-n", self.name, "link", "set", self.wire, "down")

    def mend(self) -> None:
        """Undo `cut`."""
        ip("-n", self.name, "link", "set", self.wire, "up")

    def throttle(self, rate: str | None) -> None:
        """Let no more than ``rate`` out, in the notation of `tc`: ``3mbit``; None lifts the limit."""
        shape = "del dev {} root" if rate is None else f"replace dev {{}} root tbf rate {rate} burst 32kb latency 400ms"
        command = ["tc", "-n", self.name, "qdisc", *shape.format(self.wire).split()]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def received(self) -> int:
        """Bytes that have come over the wire so far."""
        (device,) = json.loads(ip("-n", self.name, "-s", "-j", "link", "show", "dev", self.wire))
        count: int = device["stats64"]["rx"]["bytes"]
        return count


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def available() -> bool:
    """Whether this process may make network namespaces."""
    name = f"st{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces that reach one another and nobody else."""
    cores = sorted(os.sched_getaffinity(0))
    hosts = (
        Host(f"st{os.getpid()}a", "10.77.0.1", cores[0]),
        Host(f"st{os.getpid()}b", "10.77.0.2", cores[-1]),
    )
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        here, there = hosts
        ip(
            "link",
            "add",
            here.wire,
            "netns",
            here.name,
            "type",
            "veth",
            "peer",
            "name",
            there.wire,
            "netns",
            there.name,
        )
        for host in hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.wire)
            for device in ("lo", host.wire):
                ip("-n", host.name, "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


@contextlib.contextmanager
def serving_on_both(
    hosts: tuple[Host, Host], model: Path, *options: str, folder: Path, seconds: float = 300
) -> Iterator[httpx.Client]:
    """One server over both hosts; yields a client of it, which need not be in a namespace. Logs go to ``folder``."""
    here, there = hosts
    starling = Path(sys.executable).with_name("starling")
    both = ["--data-parallel-size", "2", "--data-parallel-size-local", "1"]
    both += ["--data-parallel-address", here.address, "--data-parallel-rpc-port", RPC_PORT, *options]
    with tempfile.TemporaryDirectory(prefix="starling-") as place:
        socket = Path(place) / "http.sock"  # a file of the file system that both share; a path of ours may be too long
        front = [starling, "serve", model, "--uds", str(socket), *both]
        headless = [starling, "serve", model, "--headless", "--data-parallel-start-rank", "1", *both]
        processes = [here.popen(front, folder / "here.log"), there.popen(headless, folder / "there.log")]
        try:
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://server", timeout=120
            ) as client:
                wait_for(client, processes, time.monotonic() + seconds, folder)
                yield client
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def wait_for(client: httpx.Client, processes: list[subprocess.Popen], deadline: float, folder: Path) -> None:
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"a host's server ended while it started; see its log in {folder}")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not answer in time; see the logs in {folder}")


def counts(client: httpx.Client) -> dict[str, float]:
    """What the front tells of prompts that were spread, by metric and labels."""
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line.startswith("starling:")]
    return {name: float(value) for name, value in lines}


def main() -> int:
    end_on_signals()
    if not available():
        print("This needs root and network namespaces (`ip netns`).", file=sys.stderr)
        return 1
    folder = ROOT / "benchmarks" / "out" / "hosts"
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--enforce-eager", "--max-num-batched-tokens", "1024"]
    print(f"Starting one server over two hosts, which takes a minute or so; logs in {folder}", flush=True)
    began = time.monotonic()
    with two_hosts() as hosts, serving_on_both(hosts, MODEL, *options, folder=folder) as client:
        print(f"Both hosts are there after {time.monotonic() - began:.0f} s", flush=True)
        for replicas in (1, 2):
            prompt = (
                f"Report {replicas}. "
                + "The quick brown fox jumps over the lazy dog. " * 550
                + "In one word, the animal is a"
            )
            star = {"star": "on", "star_num_blocks": 8, "star_query_tokens": 32, "star_replicas": replicas}
            body = {"model": str(MODEL), "prompt": prompt, "max_tokens": 4, "temperature": 0, "vllm_xargs": star}
            started = time.monotonic()
            response = client.post("/v1/completions", json=body)
            response.raise_for_status()
            text, plan = response.json()["choices"][0]["text"], json.loads(response.headers["x-starling-plan"])
            seconds = time.monotonic() - started
            over = "1 host" if plan["replicas"] == 1 else f"{plan['replicas']} hosts"
            print(f"{plan['prompt_tokens']:,} tokens over {over}: {seconds:.1f} s, answer {text!r}", flush=True)
        told = counts(client)
        moved = told["starling:bytes_moved_total"] / 1e6
        blocks = [int(told[f'starling:spread_blocks_total{{replica="{rank}"}}']) for rank in (0, 1)]
        print(f"Blocks on each host: {blocks[0]} and {blocks[1]}; {moved:.0f} MB of KV pages came over the wire")
    return 0


if __name__ == "__main__":
    sys.exit(main())
