"""Moments in which the machine stood still: a virtual machine whose host took a processor away, for up to a minute.

A process for each processor sleeps for a moment, again and again, at the highest priority, and says when it woke up
late. That needs the right to raise the priority (root): without it the server's own load would look the same, so
nothing is noted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SLEEP_SECONDS, LATE_SECONDS = 0.02, 0.15
HIGHEST_PRIORITY = -20
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Pause:
    """One processor stood still; times are those of time.monotonic()."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class MachineWatch:
    """Notes the pauses of each processor while it is entered.

    Attributes:
        pauses: so far.
        processes: that watch, one for each processor.
    """

    pauses: list[Pause] = field(default_factory=list)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _readers: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> MachineWatch:
        for processor in sorted(os.sched_getaffinity(0)):
            command = [sys.executable, "-c", f"from {__name__} import watch; watch({processor})"]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
            self.processes.append(process)
            self._readers.append(threading.Thread(target=self._read, args=(process,), daemon=True))
            self._readers[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.pauses.append(Pause(*json.loads(line)))


def was_paused(pauses: Sequence[Pause], start: float, end: float, *, least: float, after: float) -> bool:
    """Return whether the machine stood still while something took from ``start`` to ``end``.

    Args:
        least: minimum length of a pause that counts, in seconds.
        after: seconds after a pause in which what it has delayed goes on.
    """
    return any(pause.seconds >= least and start <= pause.end + after and end >= pause.start for pause in pauses)


def watch(processor: int) -> None:
    """Print [start, end] of each pause of a processor, until nobody reads it."""
    os.sched_setaffinity(0, {processor})
    try:
        os.nice(HIGHEST_PRIORITY)
    except PermissionError:
        return
    while True:
        before = time.monotonic()
        time.sleep(SLEEP_SECONDS)
        now = time.monotonic()
        if now - before >= SLEEP_SECONDS + LATE_SECONDS:
            print(json.dumps([before, now]), flush=True)
