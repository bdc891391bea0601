"""One server over two hosts, which are network namespaces, and the faults of the link between them.

The hosts' monotonic clocks differ by days, as those of two machines do (a time namespace).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil

from examples.two_hosts import Host, client_of, ip, started_on_both, two_hosts
from tests.e2e.wait import wait_until
from tests.faults.place import Place
from tests.faults.served import ENGINE_OPTIONS, ENVIRONMENT, FRONT_OPTIONS, Served

PORT = 50051
RELAY_SECONDS = 60.0
TRANSFER_RATE, TRANSFER_BYTES = "3mbit", 500_000
"""A transfer is brought to its middle by this rate: so many bytes have arrived, and more are to come."""

LOSS = 0.1
RANDOM = 2**32 - 4096 + 56
"""Address at which a packet filter loads a random number (SKF_AD_OFF + SKF_AD_RANDOM)."""


@dataclass
class OnTwoHosts(Served):
    """A server over two hosts. Its own place is not used."""

    hosts: tuple[Host, Host]
    socket: Path
    begun: int = 0

    def http(self, timeout: float = 5) -> httpx.Client:
        return client_of(self.socket, timeout)

    def received(self) -> int:
        """Bytes that have come over the link, both ways."""
        return sum(host.received() for host in self.hosts)

    def shut_gate(self) -> None:
        """Let page transfers take long: the link is slow."""
        for host in self.hosts:
            host.throttle(TRANSFER_RATE)
        self.begun = self.received()

    def at_gate(self) -> bool:
        return self.received() - self.begun > TRANSFER_BYTES

    def open_gate(self) -> None:
        if self.begun:
            for host in self.hosts:
                host.throttle(None)
        self.begun = 0

    def memory(self) -> int:
        tree = [self.server.process, *self.server.others]
        roots = [psutil.Process(each.pid) for each in tree]
        return sum(each.memory_full_info().uss for root in roots for each in (root, *root.children(recursive=True)))


@dataclass
class Processes:
    """What Served reads of examples.server.Server."""

    process: subprocess.Popen
    others: list[subprocess.Popen]
    grpc: str
    model: str


@contextlib.contextmanager
def on_two_hosts(model: Path, *options: str, folder: Path) -> Iterator[OnTwoHosts]:
    """A server over two hosts for the duration of the block."""
    (folder / "hosts").mkdir(exist_ok=True)
    os.environ.update(ENVIRONMENT)
    with two_hosts() as (here, other), tempfile.TemporaryDirectory(prefix="starling-") as place:
        there = replace(other, prefix=("unshare", "--time", "--monotonic", "1000000"))
        relay = Path(place) / "grpc.sock"
        front = ["--grpc-port", str(PORT), *FRONT_OPTIONS]
        both = [*ENGINE_OPTIONS, *options]
        with started_on_both((here, there), model, *both, folder=folder / "hosts", front=front) as (socket, processes):
            command = [sys.executable, "-m", "tests.faults.relay", str(relay), str(PORT)]
            passing = here.popen(command, folder / "hosts" / "relay.log")
            try:
                if not wait_until(relay.exists, RELAY_SECONDS):
                    raise RuntimeError(f"the relay did not start; see {folder / 'hosts' / 'relay.log'}")
                server = Processes(processes[0], processes[1:], f"unix:{relay}", str(model))
                yield OnTwoHosts(server, Place(passing), (here, there), socket)
            finally:
                passing.kill()
                passing.wait()


@contextlib.contextmanager
def cut(served: OnTwoHosts, _: str) -> Iterator[None]:
    served.hosts[1].cut()
    try:
        yield
    finally:
        served.hosts[1].mend()


@contextlib.contextmanager
def slow_link(served: OnTwoHosts, _: str) -> Iterator[None]:
    for host in served.hosts:
        host.throttle("1mbit")
    try:
        yield
    finally:
        for host in served.hosts:
            host.throttle(None)


@contextlib.contextmanager
def lossy(served: OnTwoHosts, _: str) -> Iterator[None]:
    """Each packet is lost with probability LOSS, in both directions.

    `tc netem` is not in every kernel. A packet filter chooses packets at random here, and a device whose other end is
    down swallows them.
    """
    program = f"4,32 0 0 {RANDOM},53 1 0 {int(LOSS * 2**32)},6 0 0 4294967295,6 0 0 0"
    for host in served.hosts:
        ip("-n", host.name, "link", "add", "void0", "type", "veth", "peer", "name", "void1")
        ip("-n", host.name, "link", "set", "void0", "up")
        tc(host, "qdisc add dev {} clsact")
        tc(host, "filter add dev {} egress bpf bytecode", program, "action mirred egress redirect dev void0")
    try:
        yield
    finally:
        for host in served.hosts:
            tc(host, "qdisc del dev {} clsact")
            ip("-n", host.name, "link", "del", "void0")


def tc(host: Host, *words: str) -> None:
    arguments = [part for word in words for part in ([word] if "," in word else word.format(host.device).split())]
    subprocess.run(["tc", "-n", host.name, *arguments], check=True, capture_output=True, text=True)
