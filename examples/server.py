"""Start `starling serve` as a process of its own, wait until it answers, stop it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Server:
    """A running `starling serve`."""

    process: subprocess.Popen
    http: str  # base URL
    grpc: str  # host:port, of use where gRPC is served
    model: str
    log: Path

    def wait(self, seconds: float, tell: Callable[[str], object]) -> None:
        """Wait until it answers, telling the last line of its log; RuntimeError where it ends or takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"the server ended with exit code {self.process.returncode}:\n{tail}")
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.http}/health", timeout=5).close()
                return
            tell(last_message(self.log))
            time.sleep(0.2)
        raise RuntimeError(f"the server did not answer within {seconds:.0f} s; its log is {self.log}")

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, and after ``seconds`` SIGKILL; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this program as Ctrl-C does, so that its server ends with it."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def free_port(wanted: int = 0) -> int:
    """``wanted`` where nothing listens on that loopback port, else a free one."""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", wanted)) as listener:
        return listener.getsockname()[1]
    return free_port()


def last_message(log: Path) -> str:
    """The last line of a server's log, without process, time and place."""
    lines = log.read_text(errors="replace").splitlines() or [""]
    return re.sub(r"^(\(.*?\) )?([A-Z]+ [\d-]+ [\d:]+ \[.*?\] )?", "", lines[-1])


@contextlib.contextmanager
def serving(
    model: str | Path,
    *options: str,
    log: Path,
    port: int = 0,
    grpc_port: int | None = 0,
    seconds: float = 600,
    tell: Callable[[str], object] = lambda message: None,
) -> Iterator[Server]:
    """Serve a model on loopback ports while the block runs; both ports are free ones unless given.

    Args:
        grpc_port: None serves no gRPC.
        options: further options of `starling serve`.
        log: file for what the server prints.
        seconds: how long the start may take.
        tell: called with what the server is doing, several times a second while it starts.
    """
    port, grpc_port = free_port(port), None if grpc_port is None else free_port(grpc_port)
    command = [Path(sys.executable).with_name("starling"), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += [*([] if grpc_port is None else ["--grpc-port", str(grpc_port)]), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A process group of its own: Ctrl-C in the terminal reaches us alone, and we stop the server in order. Not a
        # session: Linux's autogroup sets those apart, and vLLM's spinning processes, one on each core, which yield to
        # their own group only, then keep us from running for as long as they spin.
        process = subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT | os.environ, process_group=0)
    server = Server(process, f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", str(model), log)
    try:
        server.wait(seconds, tell)
        yield server
    finally:
        server.stop()
