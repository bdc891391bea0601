"""Memory shared between clients: each client gets at most a part of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Quota:
    """Limits of the bytes that all clients together, and one client alone, may use.

    Args:
        total: bytes of all clients.
        of_client: bytes of one client.
        make_error: makes the exception of a refusal. Room may be free again later.
    """

    def __init__(self, total: int, of_client: int, make_error: Callable[[], Exception]) -> None:
        self.total = total
        self.of_client = of_client
        self.make_error = make_error
        self.used: Counter[str] = Counter()

    @contextmanager
    def room(self, client: str) -> Iterator[Room]:
        """Yield room for a client's data, and release it at the end.

        Args:
            client: name of the client.
        """
        room = Room(self, client)
        try:
            yield room
        finally:
            self.used[client] -= room.size
            self.used += Counter()  # drops clients that use nothing


class Room:
    """The part of a quota that one call uses, in bytes."""

    def __init__(self, quota: Quota, client: str) -> None:
        self.quota = quota
        self.client = client
        self.size = 0

    def take(self, size: int) -> None:
        """Use ``size`` bytes more.

        Raises:
            Exception: the quota's error if there is no room.
        """
        quota = self.quota
        if quota.used[self.client] + size > quota.of_client or quota.used.total() + size > quota.total:
            raise quota.make_error()
        quota.used[self.client] += size
        self.size += size
