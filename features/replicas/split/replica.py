"""What a front needs of a replica for one prompt that is split over several: of its own engine or another server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from starling.scheduler.star.request_metadata import PageSource


class PartAborted(Exception):
    """A client has aborted a part of a prompt, by the request's id."""


@dataclass(frozen=True)
class HeldPart:
    """A part that is prefilled; its replica holds the pages.

    Attributes:
        name: under which the replica holds them.
        source: where they are.
        query_addresses: where each tensor-parallel rank takes queries, if the part is a shard.
    """

    name: str
    source: PageSource
    query_addresses: list[dict[str, Any]] = field(default_factory=list)


class Replica(Protocol):
    """One replica, for one prompt.

    Attributes:
        label: its name in metrics; all other servers have one.
        has_lost_pages: whether the pages that it holds, or will hold, may be gone.
    """

    label: str

    @property
    def has_lost_pages(self) -> bool: ...

    async def state(self) -> dict[str, Any]:
        """What features/replicas/replica_state.py says.

        Without ``pages``: the replica reserves its memory itself. Without ``layout``: it was compared before.

        Raises:
            ReplicaUnavailable: the replica does not answer.
        """

    async def prefill(self, first_block: int, stop_block: int) -> HeldPart | None:
        """Prefill star blocks and hold their pages; None where they have no whole page.

        Raises:
            ReplicaUnavailable: the replica does not answer.
            PartAborted: a client has aborted the part.
        """

    async def renew(self) -> float:
        """Let the replica hold the pages on; returns until when a fetch of them may begin (features/replicas/clock.py).

        Raises:
            ReplicaUnavailable: the pages may be gone.
        """

    async def release(self) -> None:
        """Let the replica free what it holds for the prompt, and end the reservation there; raises nothing.

        To be called when no part runs there any more. A second call does nothing.
        """
