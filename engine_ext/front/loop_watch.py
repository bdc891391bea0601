"""Watch over a front's event loop: reports when it stalled, and the code that ran. All clients wait during a stall."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from vllm.logger import init_logger

from starling.engine_ext.front.observability import front_metrics

logger = init_logger("vllm.starling")

BEAT_SECONDS = 0.05
STALL_SECONDS = 0.2
STARVED_SHARE = 0.75
LOG_SECONDS = 10.0
"""Minimum seconds between two log lines. Stalls in between are only counted."""

NUM_FRAMES = 6
IDLE_MODULES = ("asyncio.runners", "asyncio.base_events", "selectors", "uvloop")
"""Modules of a thread's innermost frame while its event loop runs no callback."""


def what_runs(frame: FrameType | None) -> str | None:
    """Return the innermost functions of a thread that runs an event loop, or None if the loop is idle."""
    if frame is None or frame.f_globals.get("__name__", "").startswith(IDLE_MODULES):
        return None
    inner = traceback.extract_stack(frame)[-NUM_FRAMES:]
    return ", in ".join(
        f"{call.name} ({'/'.join(Path(call.filename).parts[-2:])}:{call.lineno})" for call in inner[::-1]
    )


PRESSURE = Path("/proc/pressure/cpu")


def waited_for_processors() -> float:
    """Return the seconds since boot in which any process waited for a processor, or 0 if Linux has no PSI."""
    try:
        return int(PRESSURE.read_text().split("total=", 1)[1].split()[0]) / 1e6
    except (OSError, ValueError, IndexError):
        return 0.0


class ThreadTime:
    """Processor time of a thread, or 0 if the system, unlike Linux, does not count it.

    Args:
        thread: the system's id of the thread.
    """

    def __init__(self, thread: int) -> None:
        self.file: int | None = None
        with contextlib.suppress(OSError):
            self.file = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def seconds(self) -> tuple[float, float]:
        """Return the seconds the thread has run, and the seconds it was ready to run while others had the processor."""
        if self.file is None:
            return 0.0, 0.0
        run, ready = os.pread(self.file, 100, 0).split()[:2]
        return int(run) / 1e9, int(ready) / 1e9

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)


class LoopWatch:
    """Watch of the running event loop: a beat that is late when the loop stalls, and a thread that finds out why.

    Time in which other processes had the processor is no stall. Neither is time in which the whole process stood still,
    because it or its machine was stopped or waited for memory. The process then takes no CPU time, and the watching
    thread does not run either.

    If all processors were taken most of the time, only the time in which the loop's own thread ran counts: it may have
    waited for Python's lock, whose holder waited for a processor. If the thread itself waited for a processor nearly
    all the time, nothing counts: when it gets one, it has to catch up with everything that arrived in the meantime.

    Args:
        on_stall: called in the loop after each stall with its seconds.
        pressure: returns the seconds, counted from some start, in which all processors were taken.
    """

    def __init__(
        self, on_stall: Callable[[float], None], pressure: Callable[[], float] = waited_for_processors
    ) -> None:
        self.on_stall = on_stall
        self.pressure = pressure
        self.loop, self.thread = asyncio.get_running_loop(), threading.get_ident()
        self.own = ThreadTime(threading.get_native_id())
        self.running: str | None = None
        self.witnessed = 0.0  # seconds in which the other thread has run while the beat was late
        self.logged = float("-inf")
        self.stopped = threading.Event()
        self._note()
        self.handle = self.loop.call_later(BEAT_SECONDS, self._beat)
        threading.Thread(target=self._look, name="starling-loop-watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching. Call it in the event loop."""
        self.stopped.set()
        self.handle.cancel()
        self.own.close()

    def _note(self) -> None:
        self.last, self.cpu = time.monotonic(), time.process_time()
        self.times, self.pressed = self.own.seconds(), self.pressure()

    def _beat(self) -> None:
        late = time.monotonic() - self.last - BEAT_SECONDS
        if late >= STALL_SECONDS:
            run, ready = (now - before for now, before in zip(self.own.seconds(), self.times, strict=True))
            is_crowded = self.pressure() - self.pressed >= late / 2
            stood = min(late - ready, run) if is_crowded else late - ready
            if not (is_crowded and ready >= STARVED_SHARE * late):
                self._stood(stood, time.process_time() - self.cpu)
        self.running, self.witnessed = None, 0.0
        self._note()
        self.handle = self.loop.call_later(BEAT_SECONDS, self._beat)

    def _stood(self, seconds: float, cpu: float) -> None:
        has_waited = self.running is not None and self.witnessed >= seconds / 2
        if seconds < STALL_SECONDS or not (has_waited or cpu >= seconds / 2):
            return
        self.on_stall(seconds)
        if self.last - self.logged >= LOG_SECONDS:
            self.logged = self.last
            what = self.running or "not known, since another thread ran too"
            logger.warning(
                "The event loop stood still for %.2f s, in which no client was served. Ran: %s", seconds, what
            )

    def _look(self) -> None:
        looked = time.monotonic()
        while not self.stopped.wait(BEAT_SECONDS):
            before, looked = looked, time.monotonic()
            if looked - self.last - BEAT_SECONDS >= STALL_SECONDS / 2:
                self.witnessed += min(looked - before, STALL_SECONDS)
                self.running = what_runs(sys._current_frames().get(self.thread)) or self.running


def watch_loop() -> LoopWatch:
    """Watch the running event loop of a front, and count stalls in its metrics."""
    metrics, longest = front_metrics(), 0.0

    def count(seconds: float) -> None:
        nonlocal longest
        longest = max(longest, seconds)
        metrics.loop_stalls.inc()
        metrics.longest_loop_stall.set(longest)

    return LoopWatch(count)
