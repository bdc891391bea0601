"""Start `starling serve` in a separate process, wait until it answers, and stop it."""

import contextlib
import os
import random
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Server:
    """A running `starling serve`."""

    process: Popen
    http: str  # base URL
    grpc: str  # host:port; meaningless if gRPC is not served
    model: str
    log: Path

    def wait(self, seconds: float, on_message: Callable[[str], object]) -> None:
        """Wait until the server answers.

        Args:
            seconds: maximum time to wait.
            on_message: function called with the last message of the log, several times a second.

        Raises:
            RuntimeError: the server ends, or does not answer in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"the server ended with exit code {self.process.returncode}:\n{tail}")
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.http}/health", timeout=5).close()
                return
            on_message(last_message(self.log))
            time.sleep(0.2)
        raise RuntimeError(f"the server did not answer within {seconds:.0f} s; its log is {self.log}")

    def stop(self, seconds: float = 30) -> int:
        """Send SIGTERM, and SIGKILL if the server still runs after ``seconds``; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


def end_on_signals() -> None:
    """Raise KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP, so that the program stops its server before it ends.

    Under nohup, SIGHUP is ignored, and stays so.
    """

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def free_ports(*preferred: int) -> list[int]:
    """Return each preferred loopback port if nothing listens on it, otherwise a free one; no two are the same.

    A free port lies below Linux's ephemeral ports (32768 and up), so that no outgoing connection takes it before the
    server does. 0 means any free port.
    """
    others = iter(random.SystemRandom().sample(range(20000, 32768), 1000))
    with contextlib.ExitStack() as held:

        def hold(port: int) -> int:
            try:
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                return hold(next(others))
            return port

        return [hold(port or next(others)) for port in preferred]


def last_message(log: Path) -> str:
    """Return the last line of a server's log, without the prefix of process, time and source line."""
    lines = log.read_text(errors="replace").splitlines() or [""]
    return re.sub(r"^(\(.*?\) )?([A-Z]+ [\d-]+ [\d:]+ \[.*?\] )?", "", lines[-1])


@contextlib.contextmanager
def serving(
    model: str | Path,
    *options: str,
    log: Path,
    port: int = 0,
    grpc_port: int | None = 0,
    program: str = "starling",
    seconds: float = 600,
    on_message: Callable[[str], object] = lambda message: None,
    prefix: Sequence[str | Path] = (),
) -> Iterator[Server]:
    """Serve a model on loopback ports for the duration of the block.

    Args:
        model: name or path of the model.
        options: further options of `starling serve`.
        program: program to run; `vllm` serves without gRPC and without Starling's options.
        log: file for the output of the server.
        port, grpc_port: preferred ports, see ``free_ports``; ``grpc_port`` may be None for a server without gRPC.
        seconds: maximum time of the start.
        on_message: called with the last message of the log, several times a second while the server starts.
        prefix: a command that runs the server's command, such as `nsenter`, in its own process.

    Raises:
        RuntimeError: the server ends during its start, or takes longer than ``seconds``.
    """
    http, grpc = free_ports(port, grpc_port or 0)
    command = [*prefix, Path(sys.executable).with_name(program), "serve", model, "--host", "127.0.0.1"]
    command += ["--port", str(http), *([] if grpc_port is None else ["--grpc-port", str(grpc)]), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A separate process group, so that Ctrl-C in the terminal reaches only this process, which stops the server in
        # order. Not a separate session: Linux's autogroup schedules each session as a group, and vLLM's spinning
        # processes (one per core) yield only to their own group. They would keep this process from running.
        process = Popen(command, stdout=output, stderr=output, env=ENVIRONMENT | os.environ, process_group=0)
    server = Server(process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", str(model), log)
    try:
        server.wait(seconds, on_message)
        yield server
    finally:
        server.stop()
