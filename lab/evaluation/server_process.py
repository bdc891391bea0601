"""Starts `starling serve` in a child process for the duration of a measurement."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from starling.config.parsing import plain
from starling.lab.command_line import CommandFailed
from starling.lab.evaluation.answers import ServerError

START_SECONDS, STOP_SECONDS = 1800, 60
CHOSEN_HERE = ("--host", "--port", "--uds", "--ssl-keyfile", "--ssl-certfile")


class StartError(CommandFailed):
    """The server did not start, or ended before the measurement did."""


@contextlib.contextmanager
def served(model: str, options: Sequence[str], log: Path) -> Iterator[str]:
    """Run `starling serve MODEL` on a free loopback port for the duration of the block and yield its base URL.

    The server also ends when this process ends.

    Args:
        options: further options of `starling serve`.
        log: file for the output of the server.

    Raises:
        ValueError: an option that is chosen here.
        StartError: the server did not start, or ended within the block, which a ServerError showed.
    """
    for option in options:
        if option_name(option) in CHOSEN_HERE:
            raise ValueError(
                f"{option} is refused: it is chosen here for the server of MODEL. Allowed: --base-url, with a server"
            )
    port = free_port()
    program = "starling.engine_ext.serving.cli.ended_with_parent"
    command = [sys.executable, "-m", program, str(os.getpid()), "serve", model, *options]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # In a process group of its own, so that Ctrl-C reaches only this process, which then stops the server.
        process = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
    try:
        base_url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, base_url, log)
        yield base_url
    except ServerError as error:
        if process.poll() is None:
            raise
        raise StartError(f"{error}\n{last_words(process, log)}") from None
    finally:
        stop(process)


def option_name(argument: str) -> str:
    """Return the name of a command line's option, which may have its value behind a "=", as vLLM's parser reads it."""
    return argument.partition("=")[0].replace("_", "-")


def free_port() -> int:
    """Return a loopback port below Linux's ephemeral ports, so that no outgoing connection takes it before the server.

    Raises:
        StartError: none of the ports that were tried is free.
    """
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise StartError("no port from 20000 to 32767 is free for `starling serve`")


def wait_until_ready(process: subprocess.Popen[bytes], base_url: str, log: Path) -> None:
    """Return once the server answers (raises StartError). It is asked directly, whatever proxies are set."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(last_words(process, log))
        # The body is not read: another program may have taken the port.
        asking = httpx.stream("GET", f"{base_url}/health", timeout=5, trust_env=False)
        with contextlib.suppress(httpx.HTTPError), asking as response:
            response.raise_for_status()
            return
        time.sleep(0.5)
    raise StartError(f"`starling serve` did not answer within {START_SECONDS} s (log: {log})")


def last_words(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the exit code of a server that ended, and the end of its log."""
    tail = plain("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
    return f"`starling serve` ended with exit code {process.returncode} (log: {log}):\n{tail}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server in order, or by force after STOP_SECONDS or where the wait is interrupted."""
    process.send_signal(signal.SIGTERM)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
