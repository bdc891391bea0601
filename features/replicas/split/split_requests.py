"""The requests of a front whose prompts are split over replicas now."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any


class SplitRequests:
    """Split requests by id. Between its parts and the whole request, and before, the engine does not know one of them.

    Each has the ``request_id`` given to AsyncLLM.generate, which several may share, and ``abort()``, which ends it
    unless the engine has it.
    """

    def __init__(self) -> None:
        self._requests: list[Any] = []
        self._none_left = asyncio.Event()

    def __iter__(self) -> Iterator[str]:
        return iter([request.request_id for request in self._requests])

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Any) -> None:
        self._requests.append(request)
        self._none_left.clear()

    def remove(self, request: Any) -> None:
        self._requests.remove(request)
        if not self._requests:
            self._none_left.set()

    def abort(self, request_id: str) -> None:
        """End all requests of an id that the engine does not have yet."""
        for request in self._requests:
            if request.request_id == request_id:
                request.abort()

    async def wait_until_ended(self, seconds: float) -> bool:
        """Wait until there is none; returns whether all have ended within this time."""
        if self._requests:
            try:
                await asyncio.wait_for(self._none_left.wait(), seconds)
            except TimeoutError:
                return False
        return True
