"""Waiting for a server."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> bool:
    """Whether the condition becomes true within ``seconds``; so many by default that a slow machine is no failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
