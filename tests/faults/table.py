"""The cells of the matrix: on which server, which fault of what, at which moment of the requests; what is expected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from tests.faults.clients import ABORTED, ANSWER, CLOSED, ERROR

START, IDLE, PREFILL, TRANSFER, DECODE = "start", "idle", "prefill", "transfer", "decode"
HTTP_HEALTH, GRPC_HEALTH = ("200",), ("SERVING",)
DEAD_HTTP, DEAD_GRPC = ("200", "503", "closed"), ("SERVING", "NOT_SERVING", "closed")


@dataclass(frozen=True)
class Expected:
    """What counts as right.

    Attributes:
        ends: how each of the four requests may end (clients.py).
        http_health, grpc_health: what the server may say of itself from the fault on.
        exit: the server's exit code; None: it serves on, and then holds no page.
        seconds: within which every request ends; for a fault that passes, after it has passed.
    """

    ends: tuple[str, ...]
    http_health: tuple[str, ...] = HTTP_HEALTH
    grpc_health: tuple[str, ...] = GRPC_HEALTH
    exit: int | None = None
    seconds: float = 120


@dataclass(frozen=True)
class Cell:
    """One fault.

    Attributes:
        server: a key of SERVERS.
        fault: a key of faults.FAULTS.
        target: what has the fault: a process by its role, or a file system.
        moment: of the requests when the fault begins. At IDLE they are sent right after it. START: before the server
            starts.
    """

    server: str
    fault: str
    target: str
    moment: str
    expected: Expected

    @property
    def name(self) -> str:
        return f"{self.server} / {self.fault} / {self.target} / {self.moment}"


FAST = json.dumps({"starling": {"replicas": {"timeout": 5}}})
"""A replica that does not answer for 5 s counts as unresponsive."""

SERVERS = {
    "one engine": ["--tensor-parallel-size", "2"],
    "replicas": ["--data-parallel-size", "2", "--num-gpu-blocks-override", "800", "--additional-config", FAST],
    "shards": ["--data-parallel-size", "2", "--num-gpu-blocks-override", "800", "--additional-config", FAST],
}
"""Options. A prompt is split over both replicas; on `shards`, the KV stays where it was computed."""

HOSTS = {
    "two hosts": ["--num-gpu-blocks-override", "800", "--additional-config", FAST],
    "two hosts, shards": ["--num-gpu-blocks-override", "800", "--additional-config", FAST],
}
"""The same for servers over two hosts."""

NOTES = {
    "SIGSTOP, N s": "the process stands for N seconds. Health does not show it, unless it is the API server: vLLM "
    "notices processes that end, not those that stand",
    "SIGKILL": "one API server does not notice the end of the coordinator. It goes on, and balances requests by its "
    "own counts. Several API servers end",
    "slow": "the process runs for 50 ms of each 200 ms",
    "link cut, N s": "the device at one end of the link is down for N seconds",
    "link slow": "1 Mbit/s both ways",
    "link lossy": "one packet in ten is lost, both ways",
    "full": "no byte is free in the file system",
    "jump": "the time of day jumps by a day in all processes",
}
"""What is said of faults in docs/faults.md."""

ROLES = {
    "one engine": ("API server", "engine", "worker"),
    "replicas": ("API server", "coordinator", "replica 0", "replica 1", "replica 1 worker"),
    "shards": ("replica 0", "replica 1", "replica 1 worker"),
}
SIGNALS = ("SIGTERM", "SIGINT")
"""End a server in an orderly way."""

MOMENTS = {
    "one engine": (IDLE, PREFILL, DECODE),
    "replicas": (IDLE, PREFILL, TRANSFER, DECODE),
    "shards": (PREFILL, DECODE),
}


def expected(server: str, fault: str, target: str, moment: str) -> Expected:
    """What is right for a cell of processes."""
    if fault in SIGNALS:
        ends = (ANSWER, ERROR, ABORTED, CLOSED) if moment == IDLE else (ANSWER, ERROR, ABORTED)
        return Expected(ends, DEAD_HTTP, DEAD_GRPC, 0, 20)
    if fault == "SIGKILL" and target == "API server":
        # gRPC's library makes an error of a closed connection.
        return Expected((CLOSED, ERROR), ("200", "closed"), ("SERVING", "closed"), -9, 20)
    if fault == "SIGKILL" and target == "coordinator":
        return Expected((ANSWER,))
    if fault == "SIGKILL":
        # vLLM ends the other replicas, which abort their requests, unless these have just ended.
        ends = (ERROR,) if server == "one engine" else (ERROR, ABORTED, ANSWER)
        ends = (*ends, CLOSED) if moment == IDLE else ends
        return Expected(ends, DEAD_HTTP, DEAD_GRPC, 1, 20)
    silent = target == "API server" and fault != "slow"
    health = {"http_health": ("200", "silence"), "grpc_health": ("SERVING", "silence")} if silent else {}
    lost = server == "shards" and fault == "SIGSTOP, 15 s"
    return Expected((ANSWER, ERROR) if lost else (ANSWER,), **health)


def cells() -> Iterator[Cell]:
    """All cells, by server; last for each those that end it."""
    for server in ROLES:
        yield from clock_cells(server)
        if server == "one engine":
            yield from disk_cells(server)
        yield from process_cells(server)
    for server in HOSTS:
        yield from link_cells(server)


def process_cells(server: str) -> Iterator[Cell]:
    for fault in SIGNALS:
        for moment in MOMENTS[server]:
            yield Cell(server, fault, "API server", moment, expected(server, fault, "API server", moment))
    for fault in ("SIGSTOP, 2 s", "SIGSTOP, 15 s", "slow", "SIGKILL"):
        for target in ROLES[server]:
            for moment in MOMENTS[server]:
                if fault != "slow" or moment != IDLE:
                    yield Cell(server, fault, target, moment, expected(server, fault, target, moment))


def clock_cells(server: str) -> Iterator[Cell]:
    for target in ("clock, one day ahead", "clock, one day back"):
        for moment in (PREFILL, DECODE):
            yield Cell(server, "jump", target, moment, Expected((ANSWER,)))


def disk_cells(server: str) -> Iterator[Cell]:
    """A server needs /dev/shm to start, and /tmp for its own metrics alone."""
    for folder in ("/tmp", "/dev/shm"):
        for moment in (PREFILL, DECODE):
            yield Cell(server, "full", folder, moment, Expected((ANSWER,)))
    yield Cell(server, "full", "/tmp", START, Expected((ANSWER,)))
    yield Cell(server, "full", "/dev/shm", START, Expected((CLOSED,), ("closed",), ("closed",), 1))


def link_cells(server: str) -> Iterator[Cell]:
    shards = server.endswith("shards")
    for fault in ("link slow", "link lossy", "link cut, 3 s", "link cut, 15 s"):
        for moment in (PREFILL, DECODE) if shards else (IDLE, PREFILL, TRANSFER, DECODE):
            if fault != "link slow" or moment in (PREFILL, DECODE):
                ends = (ANSWER, ERROR) if shards and fault == "link cut, 15 s" else (ANSWER,)
                yield Cell(server, fault, "link", moment, Expected(ends))
