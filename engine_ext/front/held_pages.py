"""What replicas hold for one split prompt, and the memory that is reserved for it there: released once, in full."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vllm.logger import init_logger

from starling.engine_ext.front.kv_reservations import KVReservations, Reservation
from starling.engine_ext.front.replica_rpc import ReplicaRPC, ReplicaTimeout
from starling.replicas.core_rpc import RELEASE

logger = init_logger("vllm.starling")


class Holder(Protocol):
    """Another server that holds pages."""

    async def release(self) -> None:
        """Let it free them; raises nothing."""


class HeldPages:
    """The pages that replicas hold for one prompt, by name.

    Attributes:
        names: replica -> the names under which it holds pages, or will once a part is complete.
        peers: other servers that hold pages, or will.
        home: the replica whose request reads pages of other replicas; None: no request reads them.
        reservation: what the prompt has reserved; None where it has reserved nothing.
    """

    def __init__(self, engine: Any, rpc: ReplicaRPC, request_id: str) -> None:
        self.engine, self.rpc, self.request_id = engine, rpc, request_id
        self.names: dict[int, list[str]] = {}
        self.peers: Sequence[Holder] = ()
        self.home: int | None = None
        self.reservation: Reservation | None = None
        self._release: asyncio.Task | None = None

    def new_name(self, rank: int) -> str:
        """A name under which a replica holds the pages of one part."""
        # Another API server may have a request of that id; a name is sent with each query, so it has a bounded length.
        name = f"{self.request_id[:64]}#{uuid.uuid4().hex}"
        self.names.setdefault(rank, []).append(name)
        return name

    async def reserve(
        self, reservations: KVReservations, num_pages: Mapping[int, int], capacity: Mapping[int, int]
    ) -> None:
        """Reserve memory, as KVReservations.reserve does."""
        self.reservation = await reservations.reserve(num_pages, capacity)

    def release(self) -> asyncio.Task:
        """Begin to release everything, once; a second call returns the same task.

        To be called when no part runs any more. Nothing may cancel the task.
        """
        if self._release is None:
            self._release = asyncio.ensure_future(self._release_all())
        return self._release

    async def _release_all(self) -> None:
        ranks = self.names.keys() | (self.reservation.num_pages.keys() if self.reservation else set())
        if self.home is not None:
            # Answered between two steps, after the abort that was sent before: nothing reads the pages then.
            await self._call(self.home, [], patient=False)
        await asyncio.gather(*(self._release_rank(rank) for rank in ranks), *(peer.release() for peer in self.peers))

    async def _release_rank(self, rank: int) -> None:
        """Release what one replica holds; its memory stays reserved until it has answered, or the engine is dead."""
        names = self.names.get(rank, [])
        if names:
            await self._call(rank, names, patient=True)
        if self.reservation is not None:
            self.reservation.release(rank)

    async def _call(self, rank: int, names: list[str], patient: bool) -> None:
        """Let a replica release pages, and wait for its answer.

        Args:
            patient: wait for a replica that hangs until it is back, or its engine is dead.
        """
        if self.engine.errored:  # a dead engine holds nothing
            return
        try:
            try:
                await self.rpc.call(self.engine, rank, RELEASE, names, always=True)
            except ReplicaTimeout as error:
                logger.error("%s: %s: it may hold this request's KV pages until it does", self.request_id, error)
                if patient and error.answer is not None:
                    await error.answer
        except Exception as error:
            logger.error("%s: replica %d may hold this request's KV pages: %s", self.request_id, rank, error)
