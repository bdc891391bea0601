"""KV memory of replicas that is reserved for prompts that are split over them, counted in pages."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping


class KVReservations:
    """The pages that are reserved for split prompts, by replica.

    With shards a prompt holds pages on several replicas to its end, so two prompts could wait for one another's pages.
    So each prompt reserves all it needs at once, first come, first served. Prompts that fetch pages release them soon:
    they do not wait for one another.
    """

    def __init__(self) -> None:
        self.reserved: Counter[int] = Counter()
        self.num_with_shards = 0
        self.changed = asyncio.Event()
        self.turn = asyncio.Lock()

    async def reserve(self, num_pages: Mapping[int, int], capacity: Mapping[int, int], shards: bool) -> Reservation:
        """Wait until each replica has so many pages that are not reserved, and reserve them.

        Args:
            num_pages: replica -> pages to reserve.
            capacity: replica -> all its pages.
            shards: whether the prompt holds them to its end.
        """
        async with self.turn:
            while (shards or self.num_with_shards) and any(
                self.reserved[replica] + count > capacity[replica] for replica, count in num_pages.items()
            ):
                self.changed.clear()
                await self.changed.wait()
            self.reserved.update(num_pages)
            self.num_with_shards += shards
        return Reservation(self, num_pages, shards)


class Reservation:
    """Pages that are reserved for one prompt.

    Attributes:
        num_pages: replica -> pages that are still reserved there.
    """

    def __init__(self, reservations: KVReservations, num_pages: Mapping[int, int], shards: bool) -> None:
        self.reservations, self.num_pages, self.shards = reservations, dict(num_pages), shards

    def release(self, replica: int) -> None:
        """Let other prompts reserve the pages of one replica; a second call does nothing."""
        self.reservations.reserved[replica] -= self.num_pages.pop(replica, 0)
        if not self.num_pages:
            self.reservations.num_with_shards -= self.shards
            self.shards = False
        self.reservations.changed.set()
