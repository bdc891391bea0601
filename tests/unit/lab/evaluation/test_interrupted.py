"""Runs of `starling eval` that end before their end, and go on where they ended."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from starling.lab.evaluation import runner
from tests.signals import ignored_by_children, kept_signals
from tests.unit.lab.evaluation.eval_runs import TASKS, evaluate, knows
from tests.unit.lab.evaluation.fake_server import served

pytestmark = pytest.mark.usefixtures("surroundings")


def test_a_failure_says_how_to_go_on_and_keeps_what_was_answered(tmp_path, capsys):
    asked = []

    def fail(body: dict) -> tuple[int, str] | None:
        asked.append(body)
        return (500, "gone") if len(asked) > 10 else None

    with served(answer=knows, fail=fail) as fake:
        assert evaluate(fake, tmp_path) == 1
        assert "failed 4 times" in (error := capsys.readouterr().err)
        assert "the same command goes on from there" in error
        fake.fail = lambda body: None
        assert evaluate(fake, tmp_path) == 0
    assert "found 9 of 24 answers" in capsys.readouterr().out


def holding_the_sixth() -> tuple[Callable[[dict], None], threading.Event, threading.Event]:
    """What a server does with each completion: the sixth sets the first event, and waits for the second."""
    asked, reached, go_on = [], threading.Event(), threading.Event()

    def fail(body: dict) -> None:
        asked.append(body)
        if len(asked) == 6:
            reached.set()
            go_on.wait(600)

    return fail, reached, go_on


@pytest.mark.parametrize("ignored", [(), (signal.SIGINT,)], ids=["none ignored", "SIGINT ignored"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_whole_lines_and_the_next_run_goes_on(tmp_path, number, ignored):
    """The server holds the sixth completion until the signal was sent. A background job of a script ignores SIGINT."""
    if number in ignored:
        pytest.skip("it has no effect")
    fail, reached, go_on = holding_the_sixth()

    with served(answer=knows, fail=fail) as fake:
        command = [sys.executable, "-m", "starling.engine_ext.serving.cli.main", "eval", "--base-url", fake.url, *TASKS]
        with ignored_by_children(ignored):
            process = subprocess.Popen([*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True)
        assert reached.wait(300)
        process.send_signal(number)
        _, error = process.communicate(timeout=300)
        go_on.set()
        assert process.returncode == 130
        assert "starling eval: interrupted" in error and "Traceback" not in error
        assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4
        assert evaluate(fake, tmp_path) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 24


def raise_interrupt(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN, raise_interrupt])
def test_a_signal_within_a_task_is_no_exception_of_it(tmp_path, monkeypatch, capsys, caplog, handler):
    """Whatever SIGINT does in this process."""

    async def ask(*_) -> None:
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(600)

    monkeypatch.setattr(runner, "ask", ask)
    with served(answer=knows) as fake, kept_signals():
        signal.signal(signal.SIGINT, handler)
        assert evaluate(fake, tmp_path) == 130
    gc.collect()  # asyncio logs the exception of a task that nobody has asked for when the task is gone
    assert "starling eval: interrupted" in capsys.readouterr().err
    assert caplog.records == []


def test_a_run_under_nohup_goes_on_when_the_user_logs_out(tmp_path):
    fail, reached, go_on = holding_the_sixth()

    with served(answer=knows, fail=fail) as fake, ignored_by_children([signal.SIGHUP]):
        command = [sys.executable, "-m", "starling.engine_ext.serving.cli.main", "eval", "--base-url", fake.url, *TASKS]
        process = subprocess.Popen([*command, "--out", str(tmp_path)])
        assert reached.wait(300)
        process.send_signal(signal.SIGHUP)
        go_on.set()
        assert process.wait(300) == 0


def test_a_disk_that_is_full_ends_the_run_with_a_message(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with served(answer=knows) as fake:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            assert evaluate(fake, tmp_path) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        error = capsys.readouterr().err
        assert "File too large" in error and "the same command goes on from there" in error
        assert evaluate(fake, tmp_path) == 0
