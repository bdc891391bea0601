"""Says when a front's event loop stood still, and what ran then: all clients of both fronts wait meanwhile."""

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

from starling.engine_ext.front.star_metrics import front_metrics

logger = init_logger("vllm.starling")

BEAT_SECONDS = 0.05
STALL_SECONDS = 0.2
STARVED_SHARE = 0.75
LOG_SECONDS = 10.0
"""Between two lines of the log; stalls between them are counted only."""

NUM_FRAMES = 6
IDLE_MODULES = ("asyncio.runners", "asyncio.base_events", "selectors", "uvloop")
"""Modules whose code is a thread's innermost while its event loop runs no callback."""


def what_runs(frame: FrameType | None) -> str | None:
    """The innermost functions of a thread that runs an event loop; None: the loop runs none, and waits."""
    if frame is None or frame.f_globals.get("__name__", "").startswith(IDLE_MODULES):
        return None
    inner = traceback.extract_stack(frame)[-NUM_FRAMES:]
    return ", in ".join(
        f"{call.name} ({'/'.join(Path(call.filename).parts[-2:])}:{call.lineno})" for call in inner[::-1]
    )


PRESSURE = Path("/proc/pressure/cpu")


def waited_for_processors() -> float:
    """Seconds since the start in which any process of this machine waited for a processor; 0 where Linux has no PSI."""
    try:
        return int(PRESSURE.read_text().split("total=", 1)[1].split()[0]) / 1e6
    except (OSError, ValueError, IndexError):
        return 0.0


class ThreadTime:
    """The processor time of a thread. Linux counts it; else it is 0.

    Args:
        thread: the system's id of the thread.
    """

    def __init__(self, thread: int) -> None:
        self.file: int | None = None
        with contextlib.suppress(OSError):
            self.file = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def seconds(self) -> tuple[float, float]:
        """How long it has run, and how long it was ready to run while other threads had the processor."""
        if self.file is None:
            return 0.0, 0.0
        run, ready = os.pread(self.file, 100, 0).split()[:2]
        return int(run) / 1e9, int(ready) / 1e9

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)


class LoopWatch:
    """A beat in the running event loop, which is late when the loop stands still, and a thread that looks why it is.

    The time in which other processes had the processor is no stall. Nor is that in which the whole process stood still:
    it was stopped, or its machine was, or waited for memory. Then the process takes no CPU time, and the thread that
    looks does not run either.

    Where most of the time all processors were taken, only the time counts in which the loop's own thread ran: it may
    have waited for Python's lock, whose holder waited for a processor. Where the thread itself waited for a processor
    nearly all the time, nothing counts: when it gets one, it has to catch up with all that has arrived meanwhile.

    Args:
        on_stall: called in the loop after each stall with its seconds.
        pressure: seconds, since some time, in which all processors were taken.
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
        """To be called in the event loop."""
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
    """Watch the running event loop of a front, with metrics."""
    metrics, longest = front_metrics(), 0.0

    def count(seconds: float) -> None:
        nonlocal longest
        longest = max(longest, seconds)
        metrics.loop_stalls.inc()
        metrics.longest_loop_stall.set(longest)

    return LoopWatch(count)
