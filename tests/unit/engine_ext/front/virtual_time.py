"""An event loop whose clock jumps to the next timer: timeouts pass at once, in the same order on every machine."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any

STEPS_AT_ONE_TIME, STEPS_WITHOUT_SLEEP = 20_000, 1_000
"""How often tasks may run while no time passes: behind the second number a thread that they wait for gets a millisecond
each time."""
SECONDS_FOR_A_THREAD = 300


class JumpingSelector(selectors.DefaultSelector):
    """Advances its clock instead of waiting.

    Attributes:
        now: seconds since the loop was made.
    """

    now = 0.0
    idle_calls = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        """Ready files; without any, the time of the next timer has come. Without a timer only a thread can go on.

        Raises:
            AssertionError: nothing can happen any more, or tasks run on and on while no time passes.
        """
        events = super().select(SECONDS_FOR_A_THREAD if timeout is None else 0)
        assert events or timeout is not None, "every task waits for something that never happens"
        self.idle_calls = 0 if timeout else self.idle_calls + 1
        assert self.idle_calls < STEPS_AT_ONE_TIME, "tasks run without an end, and no time passes"
        if self.idle_calls > STEPS_WITHOUT_SLEEP:
            time.sleep(0.001)
        if not events and timeout:
            self.now += timeout
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop for tasks that wait for one another, for timers and for threads, but for no other process."""

    def __init__(self) -> None:
        self.jumping = JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


def run(scenario: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """The result of a coroutine function, run on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(scenario())


def now() -> float:
    """The time of the running loop."""
    return asyncio.get_running_loop().time()


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; it is looked at once in each millisecond."""
    deadline = now() + 1000
    while not condition():
        assert now() < deadline, "the condition never holds"
        await asyncio.sleep(0.001)
