"""Shares memory between clients: each client gets at most a part of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Quota:
    """Bytes that all clients together, and one client alone, may use.

    Args:
        total: bytes of all clients.
        of_client: bytes of one client.
        make_error: makes the exception of a refusal. The room may be free later.
    """

    def __init__(self, total: int, of_client: int, make_error: Callable[[], Exception]) -> None:
        self.total = total
        self.of_client = of_client
        self.make_error = make_error
        self.used: Counter[str] = Counter()

    @contextmanager
    def room(self, client: str) -> Iterator[Room]:
        """Room for a client's data, released at the end.

        Args:
            client: its name.
        """
        room = Room(self, client)
        try:
            yield room
        finally:
            self.used[client] -= room.size
            self.used += Counter()  # drops clients that use nothing


class Room:
    """What one call uses of a quota, in bytes."""

    def __init__(self, quota: Quota, client: str) -> None:
        self.quota = quota
        self.client = client
        self.size = 0

    def take(self, size: int) -> None:
        """Use ``size`` bytes more.

        Raises:
            Exception: the quota's, where there is no room.
        """
        quota = self.quota
        if quota.used[self.client] + size > quota.of_client or quota.used.total() + size > quota.total:
            raise quota.make_error()
        quota.used[self.client] += size
        self.size += size
