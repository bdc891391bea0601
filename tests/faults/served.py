"""A server under faults: its processes by role, what it says of itself, and what it holds."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples.server import Server, serving
from starling.v1 import admin_pb2, admin_pb2_grpc
from tests.faults.clients import NO_SHARING
from tests.faults.place import Place

KEY = "faults"
HOOKS = Path(__file__).with_name("hooks")
CLOCK = "/dev/shm/clock"
ENGINE_OPTIONS = ["--dtype", "float32", "--block-size", "32", "--enforce-eager"]
# Small steps, so that a prompt takes many of them.
ENGINE_OPTIONS += ["--max-num-batched-tokens", "32", "--max-num-seqs", "16"]
FRONT_OPTIONS = ["--grpc-admin-key", KEY]
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}

SILENCE_SECONDS = 2.0
"""A health check that takes longer has no answer."""

TITLES = {
    "engine": "VLLM::EngineCore",
    "coordinator": "VLLM::DPCoordinator",
    "replica 0": "VLLM::EngineCore_DP0",
    "replica 1": "VLLM::EngineCore_DP1",
}
"""Role -> title of its process. The API server is the server's own process; `worker` is the last one of an engine."""


@dataclass
class Served:
    """A server in a place."""

    server: Server
    place: Place

    def shut_gate(self) -> None:
        """Let page transfers wait where they begin."""
        self.place.path("/tmp/gate-shut").touch()

    def at_gate(self) -> bool:
        """Whether a page transfer waits."""
        return self.place.path("/tmp/gate-reached").exists()

    def open_gate(self) -> None:
        """Undo `shut_gate`."""
        for name in ("gate-shut", "gate-reached"):
            self.place.path(f"/tmp/{name}").unlink(missing_ok=True)

    def http(self, timeout: float = 5) -> httpx.Client:
        return httpx.Client(base_url=self.server.http, timeout=timeout)

    @property
    def has_ended(self) -> bool:
        return self.server.process.poll() is not None

    def process(self, role: str) -> psutil.Process:
        """The process of a role.

        Raises:
            LookupError: there is none, or several.
        """
        root = psutil.Process(self.server.process.pid)
        if role == "API server":
            return root
        if role.endswith("worker"):
            return self.process(role.removesuffix("worker").strip() or "engine").children()[-1]
        found = [each for each in root.children(recursive=True) if TITLES[role] in each.cmdline()]
        if len(found) != 1:
            raise LookupError(f"{len(found)} processes have the title {TITLES[role]}")
        return found[0]

    def engines(self, per_request: bool = False, seconds: float = 5) -> list[admin_pb2.EngineCache]:
        """AdminService.GetCacheState.

        Raises:
            grpc.RpcError: as the call does, also after ``seconds``.
        """
        with grpc.insecure_channel(self.server.grpc, NO_SHARING) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            request = admin_pb2.GetCacheStateRequest(per_request=per_request)
            metadata = [("authorization", f"Bearer {KEY}")]
            return list(stub.GetCacheState(request, timeout=seconds, metadata=metadata).engines)

    def memory(self) -> int:
        """Bytes that the processes hold for themselves."""
        return sum(process.memory_full_info().uss for process in self.place.processes())

    def open_ports(self) -> list[str]:
        """The server's ports on which something still listens."""
        ports = (int(address.rsplit(":", 1)[1]) for address in (self.server.http, self.server.grpc))
        return [f"port of {name}" for name, port in zip(("HTTP", "gRPC"), ports, strict=True) if listens(port)]


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def served(place: Place, model: Path, *options: str, log: Path, **environment: str) -> Iterator[Served]:
    """A server in a place for the duration of the block; options and variables are added to those above."""
    path = os.pathsep.join([str(HOOKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    prefix = place.prefix(
        ENVIRONMENT | {"PYTHONPATH": path, "FAULTS_GATE": "/tmp", "FAULTS_CLOCK": CLOCK} | environment
    )
    with serving(model, *ENGINE_OPTIONS, *FRONT_OPTIONS, *options, log=log, prefix=prefix) as server:
        yield Served(server, place)


class HealthLog:
    """What the server says of itself, again and again, in a thread: each value once, in the order of their first.

    It may say NOT_SERVING shorter than the thread looks away, so that a second thread watches what it says over gRPC.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        self.http: list[str] = []
        self.grpc: list[str] = []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._run, self._watch)]
        self.channel = grpc.insecure_channel(served.server.grpc, NO_SHARING)
        for thread in self.threads:
            thread.start()

    def _run(self) -> None:
        while not self.stopped.wait(0.1):
            for log, value in ((self.http, self.http_now()), (self.grpc, self.grpc_now())):
                if value not in log:
                    log.append(value)

    def _watch(self) -> None:
        with contextlib.suppress(grpc.RpcError, ValueError):  # the latter where the channel is closed already
            for reply in health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest()):
                value = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
                if value not in self.grpc:
                    self.grpc.append(value)

    def http_now(self) -> str:
        try:
            with self.served.http(timeout=SILENCE_SECONDS) as http:
                return str(http.get("/health").status_code)
        except httpx.TimeoutException:
            return "silence"
        except httpx.TransportError:
            return "closed"

    def grpc_now(self) -> str:
        with grpc.insecure_channel(self.served.server.grpc, NO_SHARING) as channel:
            try:
                check = health_pb2_grpc.HealthStub(channel).Check
                reply = check(health_pb2.HealthCheckRequest(), timeout=SILENCE_SECONDS)
            except grpc.RpcError as error:
                return "silence" if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED else "closed"
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    def stop(self) -> None:
        self.stopped.set()
        self.channel.close()
        for thread in self.threads:
            thread.join()
