"""Interrupts a scenario at any one of the points where one of its tasks waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any


class Watched(Coroutine):
    """A coroutine that calls ``suspended()`` whenever it is about to wait."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], suspended: Callable[[], None]) -> None:
        self.coroutine, self.suspended = coroutine, suspended

    def send(self, value: Any) -> Any:
        awaited = self.coroutine.send(value)
        self.suspended()
        return awaited

    def throw(self, *error: Any) -> Any:
        awaited = self.coroutine.throw(*error)
        self.suspended()
        return awaited

    def close(self) -> None:
        self.coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.coroutine.__await__()


@contextmanager
def at_each_wait(suspended: Callable[[], None]) -> Iterator[None]:
    """Call ``suspended()`` whenever a task that is made meanwhile is about to wait."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(lambda loop, made, **options: asyncio.Task(Watched(made, suspended), loop=loop, **options))
    try:
        yield
    finally:
        loop.set_task_factory(None)


async def interrupted(scenario: Coroutine[Any, Any, Any], at: int, interrupt: Callable[[asyncio.Task], None]) -> bool:
    """Run a scenario, and interrupt it when its tasks are about to wait for the ``at``-th time, and at each later time.

    Args:
        at: from 1 on.
        interrupt: called with the scenario's task, until that has ended.

    Returns:
        Whether there was such a time. The scenario's result and its error are dropped.
    """
    count = 0

    def suspended() -> None:
        nonlocal count
        count += 1
        if count >= at and not task.done():
            interrupt(task)

    with at_each_wait(suspended):
        task = asyncio.ensure_future(scenario)
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
    return count >= at
