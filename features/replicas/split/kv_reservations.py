"""KV memory of replicas that is reserved for prompts that are split over them, counted in pages."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping


class KVReservations:
    """The pages that are reserved for split prompts, by replica.

    A prompt holds the pages of its parts until it has fetched those of other replicas, or, with shards, to its end. So
    prompts could wait for one another's pages for good. Therefore each one reserves all it needs at once, first come,
    first served.
    """

    def __init__(self) -> None:
        self.reserved: Counter[int] = Counter()
        self.changed = asyncio.Event()
        self.turn = asyncio.Lock()

    async def reserve(self, num_pages: Mapping[int, int], capacity: Mapping[int, int]) -> Reservation:
        """Wait until each replica has so many pages that are not reserved, and reserve them.

        Args:
            num_pages: replica -> pages to reserve.
            capacity: replica -> all its pages.
        """
        async with self.turn:
            while not self._are_free(num_pages, capacity):
                self.changed.clear()
                await self.changed.wait()
            self.reserved.update(num_pages)
            return Reservation(self, num_pages)

    def _are_free(self, num_pages: Mapping[int, int], capacity: Mapping[int, int]) -> bool:
        return all(self.reserved[replica] + count <= capacity[replica] for replica, count in num_pages.items())


class Reservation:
    """Pages that are reserved for one prompt.

    Attributes:
        num_pages: replica -> pages that are still reserved there.
    """

    def __init__(self, reservations: KVReservations, num_pages: Mapping[int, int]) -> None:
        self.reservations, self.num_pages = reservations, dict(num_pages)

    def release(self, replica: int) -> None:
        """Let other prompts reserve the pages of one replica; a second call does nothing."""
        self.reservations.reserved[replica] -= self.num_pages.pop(replica, 0)
        self.reservations.changed.set()
