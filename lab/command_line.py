"""Common parts of the laboratory's commands: options, progress, interruption and exit codes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130
SPEED_SECONDS = 3600  # a long prompt takes minutes, and the time left is estimated from those of the last hour
WIDE = 250  # columns of a log, so that no row of a table is broken
LINE_SECONDS = 60.0  # between two lines of progress in a log
METAVARS = {int: "N", float: "X", Path: "PATH"}


class CommandFailed(Exception):
    """Failure of something that a command needs beside its arguments, such as a server."""


def run_command(
    name: str,
    run: Callable[[], int],
    resume: Callable[[], str],
    unusable: tuple[type[Exception], ...] = (ValueError,),
) -> int:
    """Run a command, and say on standard error why it ends early.

    Args:
        name: name of the command, such as ``starling eval``.
        run: function that returns the exit code; raises ``unusable`` for arguments, and CommandFailed or OSError.
        resume: text that says how a command that failed or was interrupted goes on.

    Returns:
        The exit code of ``run``, FAILED, UNUSABLE or INTERRUPTED.
    """
    try:
        with signals_as_interrupt():
            return run()
    except unusable as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return UNUSABLE
    except (CommandFailed, OSError) as error:
        print(f"{name}: error: {error}\n{resume()}".rstrip(), file=sys.stderr)
        return FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"{name}: interrupted\n{resume()}".rstrip(), file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that its server is stopped.

    Under nohup, SIGHUP is ignored, and stays so. What SIGINT does here makes no difference: a background job of a
    script ignores it.
    """

    def interrupt(*_: object) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise KeyboardInterrupt from None
        loop.call_soon_threadsafe(cancel_tasks)  # an exception here would be one of the task that runs just now

    def cancel_tasks() -> None:
        for task in asyncio.all_tasks():
            task.cancel()

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def comma(text: str) -> tuple[str, ...]:
    """Return the parts of a list with commas."""
    return tuple(part.strip() for part in text.split(","))


def add_options(
    parser: argparse.ArgumentParser, model: type[BaseModel], without: Collection[str] = (), **changed: dict[str, Any]
) -> None:
    """Add an option for each field of a command's options. What is not given is not in the result.

    Args:
        without: fields that have no option.
        changed: field -> what is other than the field says: arguments of ``add_argument``, and "flag".
    """
    for name, field in model.model_fields.items():
        if name in without:
            continue
        kinds = {kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)}
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "" if field.is_required() or shown in (None, "") else f" (default: {shown})"
        keywords: dict[str, Any] = {"help": f"{field.description}{default}"}
        if get_origin(field.annotation) is tuple:
            keywords |= {"type": comma, "metavar": "A,B"}
        elif get_origin(field.annotation) is Literal:
            keywords |= {"choices": get_args(field.annotation)}
        else:
            (kind,) = kinds
            keywords |= {"type": kind, "metavar": METAVARS.get(kind, "TEXT")}
        keywords |= changed.get(name, {})
        flag = keywords.pop("flag", f"--{name.replace('_', '-')}")
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, required=field.is_required(), **keywords)


def given_options(args: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """Return the options of ``add_options`` that a command line gives."""
    return {name: value for name, value in vars(args).items() if name in model.model_fields}


def make_console() -> Console:
    """Make the console of standard output.

    A file or a pipe is wide: rich would take 80 columns, in which tables can't be read.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    return console


class ProgressLines(Progress):
    """A line of progress now and then in place of bars, for a log."""

    printed = 0.0

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if time.monotonic() - self.printed >= LINE_SECONDS:
            self.printed = time.monotonic()
            task = self.tasks[task_id]
            total = "" if task.total is None else f" of {task.total:g}"
            left = "" if not task.time_remaining else f", {timedelta(seconds=task.time_remaining)} left"
            self.console.print(f"{task.description}: {task.completed:g}{total}{left}")


def progress_bars(console: Console) -> Progress:
    """Return bars with counts and the time left, or lines where standard output is no terminal."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("left")]
    if not console.is_terminal:
        return ProgressLines(console=console, disable=True)
    return Progress(*columns, console=console, speed_estimate_period=SPEED_SECONDS)
