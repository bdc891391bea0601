"""Two hosts on one machine that prefill one long prompt together: `sudo make demo-hosts`.

Each host is a network namespace. A veth pair links the two. The prompt is prefilled on both hosts, and its KV pages are
sent over the link. One server spans both hosts by vLLM's multi-node data parallelism: replica 0 and the HTTP server run
on the first host, replica 1 on the second (`--headless`). Needs root, and `ip` of iproute2.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from examples.server import ENVIRONMENT, end_on_signals

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
RPC_PORT = "29650"
OPTIONS = ("--enforce-eager", "--max-num-batched-tokens", "1024")


@dataclass(frozen=True)
class Host:
    """A network namespace with one end of the link.

    Attributes:
        core: the core that the host's replica runs on.
        prefix: a command that runs each command of this host, such as `unshare`.
    """

    name: str
    address: str
    core: int
    prefix: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """Name of the network device at this end of the link."""
        return f"{self.name}-0"

    def popen(self, command: list[str | Path], log: Path) -> subprocess.Popen:
        """Start a process on this host."""
        settings = {
            "VLLM_HOST_IP": self.address,
            "GLOO_SOCKET_IFNAME": self.device,
            "VLLM_CPU_OMP_THREADS_BIND": str(self.core),
            # Real hosts without RDMA have no other transport.
            # On one machine UCX would use shared memory instead of the link.
            "UCX_TLS": "tcp",
        }
        with log.open("wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *self.prefix, *command],
                stdout=output,
                stderr=output,
                env=ENVIRONMENT | os.environ | settings,
                process_group=0,
            )

    def cut(self) -> None:
        """Take this end of the link down."""
        ip("-n", self.name, "link", "set", self.device, "down")

    def mend(self) -> None:
        """Undo `cut`."""
        ip("-n", self.name, "link", "set", self.device, "up")

    def throttle(self, rate: str | None) -> None:
        """Limit the rate at which this host sends.

        Args:
            rate: rate in the notation of `tc`, such as ``3mbit``, or None to remove the limit.
        """
        shape = "del dev {} root" if rate is None else f"replace dev {{}} root tbf rate {rate} burst 32kb latency 400ms"
        command = ["tc", "-n", self.name, "qdisc", *shape.format(self.device).split()]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def received(self) -> int:
        """Return the bytes received over the link so far."""
        (status,) = json.loads(ip("-n", self.name, "-s", "-j", "link", "show", "dev", self.device))
        count: int = status["stats64"]["rx"]["bytes"]
        return count


def ip(*arguments: str) -> str:
    """Run `ip` and return its output.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def available() -> bool:
    """Return whether this process may make network namespaces."""
    name = f"st{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two hosts that reach one another and no other network."""
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
            here.device,
            "netns",
            here.name,
            "type",
            "veth",
            "peer",
            "name",
            there.device,
            "netns",
            there.name,
        )
        for host in hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.device)
            for device in ("lo", host.device):
                ip("-n", host.name, "link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


@contextlib.contextmanager
def serving_on_both(
    hosts: tuple[Host, Host], model: Path, *options: str, folder: Path, seconds: float = 600
) -> Iterator[httpx.Client]:
    """Serve a model over both hosts and yield an HTTP client, which need not run in a namespace.

    Args:
        folder: folder for the servers' logs.
        seconds: maximum time of the start.

    Raises:
        RuntimeError: a server ended while it started, or did not respond in time.
    """
    started = started_on_both(hosts, model, *options, folder=folder, seconds=seconds)
    with started as (socket, _), client_of(socket) as client:
        yield client


def client_of(socket: Path, timeout: float = 300) -> httpx.Client:
    """Return an HTTP client of the server that listens on a Unix socket."""
    # The server closes a connection that is idle for some seconds; a request sent at that moment would get a reset.
    transport = httpx.HTTPTransport(uds=str(socket), limits=httpx.Limits(max_keepalive_connections=0))
    return httpx.Client(transport=transport, base_url="http://server", timeout=timeout)


@contextlib.contextmanager
def started_on_both(
    hosts: tuple[Host, Host], model: Path, *options: str, folder: Path, seconds: float = 600, front: Sequence[str] = ()
) -> Iterator[tuple[Path, list[subprocess.Popen]]]:
    """Serve a model over both hosts and yield the Unix socket of the HTTP server, and the processes of the two hosts.

    Args, Raises: the same as ``serving_on_both``.
        front: further options of the first host, which has the front.
    """
    here, there = hosts
    starling = Path(sys.executable).with_name("starling")
    both = ["--data-parallel-size", "2", "--data-parallel-size-local", "1"]
    both += ["--data-parallel-address", here.address, "--data-parallel-rpc-port", RPC_PORT, *options]
    with tempfile.TemporaryDirectory(prefix="starling-") as place:
        # Both hosts have the same file system. A socket below ``folder`` could have too long a path.
        socket = Path(place) / "http.sock"
        with_front = [starling, "serve", model, "--uds", str(socket), *both, *front]
        headless = [starling, "serve", model, "--headless", "--data-parallel-start-rank", "1", *both]
        processes = [here.popen(with_front, folder / "here.log"), there.popen(headless, folder / "there.log")]
        with ended(processes):
            with client_of(socket) as client:
                wait_for(client, processes, time.monotonic() + seconds, folder)
            yield socket, processes


@contextlib.contextmanager
def ended(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """End processes after the block: with SIGTERM, and with SIGKILL those that still run after 20 s."""
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(client: httpx.Client, processes: list[subprocess.Popen], deadline: float, folder: Path) -> None:
    """Wait until the server is healthy.

    Raises:
        RuntimeError: a process ended, or the deadline passed.
    """
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"a host's server ended while it started; see its log in {folder}")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not respond in time; see the logs in {folder}")


def counts(client: httpx.Client) -> dict[str, float]:
    """Return Starling's series on the server's /metrics, by name and labels."""
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line.startswith("starling:")]
    return {name: float(value) for name, value in lines}


def ask(client: httpx.Client, name: str, replicas: int | str) -> str:
    """Complete a long prompt that no other call had; returns a line that says how it went."""
    prompt = f"Report {name}. " + "The quick brown fox jumps over the lazy dog. " * 550 + "In one word, the animal is a"
    star = {"star": "on", "star_block_size": "n/8", "star_query_tokens": 32, "star_replicas": replicas}
    body = {"model": str(MODEL), "prompt": prompt, "max_tokens": 4, "temperature": 0, "vllm_xargs": star}
    started = time.monotonic()
    response = client.post("/v1/completions", json=body)
    response.raise_for_status()
    seconds = time.monotonic() - started
    text, plan = response.json()["choices"][0]["text"], json.loads(response.headers["x-starling-plan"])
    over = "1 host" if plan["replicas"] == 1 else f"{plan['replicas']} hosts"
    return f"{plan['prompt_tokens']:,} tokens over {over}: {seconds:.1f} s, answer {text!r}"


def show(hosts: tuple[Host, Host], folder: Path) -> None:
    """Serve over both hosts, and ask with the prompt on one host and on both."""
    with serving_on_both(hosts, MODEL, *OPTIONS, folder=folder) as client:
        print("Both hosts are ready", flush=True)
        for replicas in (1, 2):
            print(ask(client, str(replicas), replicas), flush=True)
        metrics = counts(client)
        moved = metrics["starling:bytes_moved_total"] / 1e6
        here, there = (int(metrics[f'starling:split_blocks_total{{replica="{rank}"}}']) for rank in (0, 1))
        print(
            f"Star blocks on each host: {here} and {there}; {moved:.0f} MB of KV pages sent over the link", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    end_on_signals()
    if not available():
        print("This needs root and network namespaces (`ip netns`).", file=sys.stderr)
        return 1
    folder = ROOT / "benchmarks" / "out" / "hosts"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Starting, which takes about a minute; logs in {folder}", flush=True)
    with two_hosts() as hosts:
        show(hosts, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
