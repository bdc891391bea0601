"""The faults, each as a context manager that begins it and ends it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import psutil

from tests.faults import hosts
from tests.faults.served import CLOCK, Served

SLOW_ON, SLOW_OFF = 0.05, 0.15
"""Seconds that a slow process runs and stands, in turn."""
DAY = 86400


def sender(signal_number: int) -> Callable[[Served, str], AbstractContextManager[None]]:
    """A fault that sends a signal once."""

    @contextlib.contextmanager
    def send(served: Served, role: str) -> Iterator[None]:
        served.process(role).send_signal(signal_number)
        yield

    return send


@contextlib.contextmanager
def stop(served: Served, role: str) -> Iterator[None]:
    process = served.process(role)
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


@contextlib.contextmanager
def slow(served: Served, role: str) -> Iterator[None]:
    process, ended = served.process(role), threading.Event()

    def run() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not ended.is_set():
                process.suspend()
                ended.wait(SLOW_OFF)
                process.resume()
                ended.wait(SLOW_ON)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def jump(served: Served, target: str) -> Iterator[None]:
    """All processes read another time of day; monotonic clocks go on. The end of the fault is a jump too."""
    clock = served.place.path(CLOCK)
    clock.write_text(str(-DAY if target.endswith("back") else DAY))
    try:
        yield
    finally:
        clock.unlink()


@contextlib.contextmanager
def full(served: Served, folder: str) -> Iterator[None]:
    served.place.fill(folder)
    try:
        yield
    finally:
        served.place.unfill(folder)


@dataclass(frozen=True)
class Fault:
    """A fault, and how long it lasts.

    Attributes:
        begin: called with the server and the target of the cell.
        seconds: the fault passes after this time, or once all requests have ended; inf: only then.
    """

    begin: Callable[[Served, str], AbstractContextManager[None]]
    seconds: float


FAULTS = {
    "none": Fault(lambda served, target: contextlib.nullcontext(), 0),
    "SIGKILL": Fault(sender(signal.SIGKILL), float("inf")),
    "SIGTERM": Fault(sender(signal.SIGTERM), float("inf")),
    "SIGINT": Fault(sender(signal.SIGINT), float("inf")),
    "SIGSTOP, 2 s": Fault(stop, 2),
    "SIGSTOP, 15 s": Fault(stop, 15),
    "slow": Fault(slow, float("inf")),
    "jump": Fault(jump, float("inf")),
    "full": Fault(full, float("inf")),
    "link cut, 3 s": Fault(hosts.cut, 3),
    "link cut, 15 s": Fault(hosts.cut, 15),
    "link slow": Fault(hosts.slow_link, float("inf")),
    "link lossy": Fault(hosts.lossy, float("inf")),
}
