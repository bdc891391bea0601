"""A replica that is another server's engine: it prefills a part of a prompt, and holds the pages, during one gRPC call.

The call is the lease of the pages. The other server holds them until this one says that it needs them no more, or for
some time after the call has broken: so nothing stays behind on the other server, however this one ends
(engine_ext/serving/grpc/replica_service.py).
"""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

import grpc
import msgspec

from starling.features.replicas import clock
from starling.features.replicas.split.engine_replica import HEALTH_CHECK_SECONDS, SplitPrompt
from starling.features.replicas.split.peers import Peer, fetch_seconds, reason_of
from starling.features.replicas.split.replica import HeldPart, PartAborted
from starling.features.replicas.split.replica_rpc import ReplicaUnavailable, retrieve_error
from starling.scheduler.star.request_metadata import PageSource
from starling.v1 import replica_pb2 as pb

STATE_SECONDS = 5.0
"""How long a prompt waits for the state of a peer. A peer answers between two steps of its engine."""

REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""What a peer refuses of one prompt says nothing of others: it can't compute this one, or has no room for it now."""

FAILED = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
"""An error that nobody expected, which may come from the prompt or from the peer."""

RELEASE_SECONDS = 5.0
"""How long a release waits for the peer's answer."""


class Address(TypedDict):
    """Where a worker's memory is (features/replicas/page_transfer.py)."""

    name: str
    metadata: bytes
    bases: list[int]
    device: int
    holds: int
    layout: dict[str, int | str]


class PeerLost(ReplicaUnavailable):
    """A call to a peer has failed, or the peer has not answered in time."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"peer {address} is lost to this prompt: {reason}")


class PeerReplica:
    """A peer as a Replica (replica.py): one call to it, for one prompt.

    Args:
        peer: the other server.
        prompt: the prompt, a part of which the peer may prefill.
        timeout: seconds within which the peer's engine has to answer while it prefills.
    """

    label = "peers"

    def __init__(self, peer: Peer, prompt: SplitPrompt, timeout: float) -> None:
        self.peer, self.prompt, self.timeout = peer, prompt, timeout
        self.identity = peer.identity
        self.lost: PeerLost | None = None
        self._call: Any = None
        self._is_released = False
        self._ending: asyncio.Future | None = None
        self._writing: asyncio.Future | None = None  # the last question whether the peer still holds the pages
        self._answered = asyncio.Event()

    @property
    def has_lost_pages(self) -> bool:
        return self.lost is not None

    async def state(self) -> dict[str, Any]:
        """What the peer has cached of the prompt, and how busy it is (raises ReplicaUnavailable)."""
        try:
            message = self.prompt.message
        except ValueError as error:  # this server's engine says so too, in terms of the request
            raise PeerLost(self.peer.address, f"the prompt can't be sent: {error}") from None
        self._call = self.peer.prefill_part()
        response = await self._exchange(message, STATE_SECONDS)
        state = response.state
        if len(state.cached) > len(self.prompt.plan.starts) or not set(state.cached) <= {0, 1}:
            raise self._lose("its state is not that of this prompt")
        return {"cached": state.cached, "has_anchor": state.has_anchor, "queued_tokens": state.queued_tokens}

    async def prefill(self, first_block: int, stop_block: int) -> HeldPart | None:
        part = pb.Part(first_block=first_block, stop_block=stop_block)
        # The peer asks its engine some time after each message, and once the engine has answered, sends the next one.
        seconds = self.timeout + 2 * HEALTH_CHECK_SECONDS
        response = await self._exchange(pb.PrefillPartRequest(part=part), seconds)
        while response.WhichOneof("step") == "alive":
            response = await self._exchange(None, seconds)
        if response.WhichOneof("step") == "aborted":
            raise PartAborted
        self._ending = asyncio.ensure_future(self._read_to_end())
        source = page_source(response.held)
        start, stop = self.prompt.part(first_block, stop_block)
        count = (stop - start) // self.prompt.page_size
        if source is None or len(source.page_ids) != count or (count and source.start != start):
            raise self._lose("it holds other pages than it was asked for")
        if count and not self._has_sent(source):
            raise self._lose("another server answers at its address")
        self.peer.note_held_part()
        return HeldPart(self.peer.address, source) if count else None

    def _has_sent(self, source: PageSource) -> bool:
        """Whether the server whose model and layout were compared holds the pages, and not one that is there since."""
        if self.identity is None:
            return False
        ranks = int(self.identity.properties.get("tensor_parallel", 1))
        return source.addresses[0]["name"] == self.identity.name and len(source.addresses) == ranks

    async def renew(self) -> float:
        """Let the peer hold the pages on; returns until when a fetch of them may begin (raises ReplicaUnavailable).

        Time counts from before the question: this process may stand still at any moment.
        """
        if self.lost is not None:
            raise self.lost
        asked = clock.now()
        self._answered.clear()
        self._writing = asyncio.ensure_future(self._call.write(pb.PrefillPartRequest(renew=pb.Renew())))
        self._writing.add_done_callback(retrieve_error)
        try:
            async with asyncio.timeout(self.timeout):
                await asyncio.shield(self._writing)  # gRPC cancels a call whose message is cancelled
                await self._answered.wait()
        except TimeoutError:
            raise self._lose(f"it has not answered for {self.timeout:g} s") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise self._lose(reason_of(error)) from None
        if self.lost is not None:
            raise self.lost
        return asked + fetch_seconds(self.timeout)

    async def release(self) -> None:
        """Let the peer free the pages; or, where it still prefills, end the part."""
        if self._call is None or self._is_released:
            return
        self._is_released = True
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                if self._writing is not None:
                    await asyncio.wait({self._writing})
                await self._call.write(pb.PrefillPartRequest(release=pb.Release()))
                await self._call.done_writing()
                self._ending = self._ending or asyncio.ensure_future(self._read_to_end())
                await asyncio.wait({self._ending})
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass
        finally:
            self._call.cancel()

    async def _exchange(self, request: pb.PrefillPartRequest | None, seconds: float) -> pb.PrefillPartResponse:
        """Send a message, if there is one, and return the next one of the peer.

        Raises:
            PeerLost: the call has failed, or has ended, or nothing has come in time.
        """
        try:
            async with asyncio.timeout(seconds):
                if request is not None:
                    await self._call.write(request)
                response = await self._call.read()
        except TimeoutError:
            raise self._lose(f"it has not answered for {seconds:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise self._lose_by(error) from None
        except asyncio.InvalidStateError as error:
            raise self._lose(reason_of(error)) from None
        if response is grpc.aio.EOF:
            raise self._lose("it has ended the call")
        return response

    async def _read_to_end(self) -> None:
        """Take the peer's answers, and find out when its part of the call ends: before the release, pages are lost."""
        reason = "it has ended the call"
        try:
            while await self._call.read() is not grpc.aio.EOF:
                self._answered.set()
        except grpc.aio.AioRpcError as error:
            reason = reason_of(error)
        if not self._is_released:
            self._lose(reason)
        self._answered.set()

    def _lose(self, reason: str) -> PeerLost:
        """The peer is lost to this prompt, and left out of others."""
        self.lost = PeerLost(self.peer.address, reason)
        self.peer.leave_out(reason)
        return self.lost

    def _lose_by(self, error: grpc.aio.AioRpcError) -> PeerLost:
        """The peer is lost to this prompt, and to others if the error is not about this one."""
        reason = reason_of(error)
        if error.code() not in REFUSED + FAILED:
            return self._lose(reason)
        if error.code() in FAILED:
            self.peer.note_failed_part(reason)
        self.lost = PeerLost(self.peer.address, reason)
        return self.lost


def page_source(held: pb.HeldPart) -> PageSource | None:
    """Where the pages of a part are; None: the peer sent something else."""
    try:
        addresses = msgspec.msgpack.decode(held.addresses, type=list[Address]) if held.page_ids else []
    except msgspec.DecodeError:
        return None
    if held.page_ids and not addresses:
        return None
    return PageSource(held.start, list(held.page_ids), [dict(address) for address in addresses], held.hold)
