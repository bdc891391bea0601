"""What the watch of an event loop says of calls that hold the loop, or Python's lock, and of a loop that waits."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
import time

import pytest
import uvloop

from starling.engine_ext.front import loop_watch
from starling.engine_ext.front.loop_watch import STALL_SECONDS, LoopWatch, watch_loop
from starling.engine_ext.front.observability import front_metrics

BIG = "[" + ",".join(["[]"] * 200_000) + "]"
RUNNERS = [asyncio.run, uvloop.run]


def stalls_of(function, run, pressure=lambda: 0.0) -> list[float]:
    """The stalls while ``function(watch)`` runs in a watched event loop, on a machine that is not busy."""
    stalls: list[float] = []

    async def main() -> None:
        watch = LoopWatch(stalls.append, pressure)
        await asyncio.sleep(0.3)
        result = function(watch)
        if asyncio.iscoroutine(result):
            await result
        await asyncio.sleep(0.3)
        watch.stop()

    run(main())
    return stalls


def blocked_by_a_call(watch: LoopWatch) -> None:
    """Until the watch has looked for most of the time."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < 3 * STALL_SECONDS or watch.witnessed < 0.7 * passed:
        time.sleep(STALL_SECONDS)


def blocked_in_c_with_pythons_lock(watch: LoopWatch) -> None:
    """json.loads lets no other thread run."""
    began = time.thread_time()
    gc.disable()  # else what is collected meanwhile may be what runs
    try:
        while watch.running is None or time.thread_time() - began < 3 * STALL_SECONDS:
            json.loads(BIG)
    finally:
        gc.enable()


@pytest.mark.parametrize("run", RUNNERS, ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("function", [blocked_by_a_call, blocked_in_c_with_pythons_lock])
def test_a_call_that_holds_the_loop_is_counted_and_named(function, run, caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("vllm").addHandler(caplog.handler)
    try:
        (stall,) = stalls_of(function, run)
    finally:
        logging.getLogger("vllm").removeHandler(caplog.handler)
    assert stall >= 2 * STALL_SECONDS
    (line,) = {record.getMessage() for record in caplog.records if "event loop" in record.getMessage()}
    assert function.__name__ in line and "test_loop_watch.py" in line


def test_on_a_crowded_machine_only_the_time_counts_in_which_the_loop_ran():
    """Its thread may wait for Python's lock, and who has that for a processor."""
    assert stalls_of(blocked_by_a_call, asyncio.run, time.monotonic) == []
    (stall,) = stalls_of(blocked_in_c_with_pythons_lock, asyncio.run, time.monotonic)
    assert stall >= 2 * STALL_SECONDS


def test_what_a_thread_catches_up_with_after_it_had_no_processor_is_no_stall(monkeypatch):
    """It has run for a quarter of a second of the time, and waited for a processor the rest of it."""
    monkeypatch.setattr(loop_watch, "ThreadTime", Starved)
    assert stalls_of(blocked_in_c_with_pythons_lock, asyncio.run, time.monotonic) == []


class Starved(loop_watch.ThreadTime):
    """As a thread that gets a tenth of a processor."""

    def seconds(self) -> tuple[float, float]:
        return time.monotonic() / 10, time.monotonic() * 9 / 10


def test_a_system_that_does_not_tell_is_not_crowded(monkeypatch, tmp_path):
    assert loop_watch.waited_for_processors() >= 0
    for text in ("", "some avg10=0.00", "some total=x"):
        (tmp_path / "cpu").write_text(text)
        monkeypatch.setattr(loop_watch, "PRESSURE", tmp_path / "cpu")
        assert loop_watch.waited_for_processors() == 0
    (tmp_path / "cpu").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 total=7\n")
    assert loop_watch.waited_for_processors() == 2.5
    monkeypatch.setattr(loop_watch, "PRESSURE", tmp_path / "none")
    assert loop_watch.waited_for_processors() == 0


@pytest.mark.parametrize("run", RUNNERS, ids=["asyncio", "uvloop"])
def test_a_loop_that_waits_does_not_stand_still(run):
    assert stalls_of(lambda _: asyncio.sleep(1), run) == []


def test_a_process_that_is_stopped_has_no_stall():
    code = """
import asyncio, os, signal, subprocess
from tests.unit.engine_ext.front.test_loop_watch import stalls_of
async def stopped(_):
    subprocess.Popen(["sh", "-c", "sleep 0.3; kill -STOP {0}; sleep 1; kill -CONT {0}".format(os.getpid())])
    await asyncio.sleep(2)
print(stalls_of(stopped, asyncio.run))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_stalls_are_on_the_metrics_page(monkeypatch):
    monkeypatch.setattr(LoopWatch.__init__, "__defaults__", (lambda: 0.0,))

    async def main() -> None:
        watch = watch_loop()
        await asyncio.sleep(0.1)
        blocked_by_a_call(watch)
        await asyncio.sleep(0.1)
        watch.stop()

    metrics = front_metrics()
    before = metrics.loop_stalls._value.get()
    asyncio.run(main())
    assert metrics.loop_stalls._value.get() == before + 1
    assert metrics.longest_loop_stall._value.get() >= 2 * STALL_SECONDS
