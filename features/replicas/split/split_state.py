"""State of a front for the replicas of its engine: calls, reserved memory, and prompts that are split now."""

from __future__ import annotations

import asyncio
import collections
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import Counter
from vllm.exceptions import RetryableRequestError
from vllm.logger import init_logger

from starling.config.scheduling import ReplicaOptions
from starling.vllm_compat.front import (
    around_shutdown,
    call_engine_core,
    num_engine_cores,
    refuse_admission,
)


class ReplicaUnavailable(Exception):
    """A replica can't be reached, or does not answer."""


class ReplicaTimeout(ReplicaUnavailable):
    """A replica has not answered in time.

    Attributes:
        answer: the answer that it owes; None where it was not called, since it owes an earlier one.
    """

    def __init__(self, rank: int, seconds: float, answer: asyncio.Future | None = None) -> None:
        super().__init__(f"replica {rank} has not answered for {seconds:g} s")
        self.answer = answer


class ReplicaRPC:
    """The calls to the replicas of one engine.

    Args:
        timeout: seconds within which a replica has to answer. It answers between two of its steps.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._unanswered: dict[int, asyncio.Future] = {}
        self._asked: dict[tuple[Any, ...], tuple[asyncio.Future, float]] = {}  # question -> call, when to give up

    def is_unresponsive(self, rank: int) -> bool:
        """Return whether a replica still owes the answer to a call that timed out."""
        call = self._unanswered.get(rank)
        if call is not None and call.done():
            del self._unanswered[rank]
        return rank in self._unanswered

    async def call(self, engine: Any, rank: int, name: str, *args: Any, always: bool = False) -> Any:
        """Call a utility of the engine core in one replica; returns its result.

        Args:
            always: send the call also to an unresponsive replica, which answers once it is back.

        Raises:
            ReplicaTimeout: the replica does not answer, or is unresponsive.
            EngineDeadError: the server's engines are dead.
        """
        if not always and self.is_unresponsive(rank):
            raise ReplicaTimeout(rank, self.timeout)
        call = asyncio.ensure_future(call_engine_core(engine, rank, name, *args))
        try:
            answered, _ = await asyncio.wait({call}, timeout=self.timeout)
        except asyncio.CancelledError:
            call.cancel()
            raise
        if not answered:
            self._unanswered[rank] = call
            call.add_done_callback(retrieve_error)
            raise ReplicaTimeout(rank, self.timeout, call)
        return call.result()

    async def ask_all(self, engine: Any, seconds: float, name: str, *args: Any) -> dict[int, Any]:
        """Call a utility in all replicas; returns the results of those that answer in time, by rank.

        A replica that owes the answer to the same question is not asked again, and not waited for any longer than it
        was at first. Its late answer is out of date, and does not count.

        Args:
            seconds: how long to wait for an answer; at most ``timeout``.

        Raises:
            EngineDeadError: the server's engines are dead.
            Exception: the utility failed in a replica.
        """
        now = asyncio.get_running_loop().time()
        asked = {}
        for rank in range(num_engine_cores(engine)):
            question = (rank, name, *args)
            if question not in self._asked or self._asked[question][0].done():
                call = asyncio.ensure_future(call_engine_core(engine, rank, name, *args))
                call.add_done_callback(retrieve_error)
                self._asked[question] = call, now + min(seconds, self.timeout)
            asked[question] = self._asked[question]
        awaited = {call: deadline for call, deadline in asked.values() if deadline > now}
        if awaited:
            await asyncio.wait(awaited, timeout=max(awaited.values()) - now)
        for question, answer in asked.items():
            if answer[0].done() and self._asked.get(question) is answer:
                del self._asked[question]
        return {question[0]: call.result() for question, (call, _) in asked.items() if call.done()}


def retrieve_error(call: asyncio.Future) -> None:
    """Take the error of a call whose caller may have given up, so that asyncio does not report it."""
    if not call.cancelled():
        call.exception()


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


class KVReservations:
    """The pages that are reserved for split prompts, by replica.

    A prompt holds the pages of its parts until it has fetched those of other replicas, or, with shards, to its end. So
    prompts could wait for one another's pages for good. Therefore each one reserves all it needs at once, first come,
    first served.
    """

    def __init__(self) -> None:
        self.reserved: collections.Counter[int] = collections.Counter()
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


class SplitMetrics:
    """Counted in the API server."""

    def __init__(self) -> None:
        self.split_blocks = Counter(
            "starling:split_blocks", "Star blocks of prompts that were split over several replicas.", ["replica"]
        )
        self.split_seconds = Counter(
            "starling:split_seconds", "Seconds from the start of such prompts until all of their parts were prefilled."
        )
        self.shard_requests = Counter(
            "starling:shard_requests", "Requests whose KV stayed on the replicas that computed it."
        )

    def count_split(self, blocks_of: Mapping[str, int], seconds: float) -> None:
        """Count one split prompt; ``blocks_of`` maps each replica to its number of star blocks."""
        for replica, blocks in blocks_of.items():
            self.split_blocks.labels(replica).inc(blocks)
        self.split_seconds.inc(seconds)


split_metrics = functools.cache(SplitMetrics)


logger = init_logger("vllm.starling")


class SplitState:
    """One for each engine.

    Attributes:
        rpc: the calls to the engine's replicas.
        reservations: of their KV memory.
        split_requests: the requests whose prompts are split over replicas now.
        internal_ids: the engine's ids of the requests that were made for parts of prompts.
        releases: calls under way that release what ended requests held on replicas.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        split_metrics()  # the series are there before the first prompt
        self.rpc = ReplicaRPC(options.timeout)
        self.reservations = KVReservations()
        self.split_requests = SplitRequests()
        self.internal_ids: set[str] = set()
        self.releases: set[asyncio.Future] = set()
        self._ends_before_engine = False

    def let_split_requests_end(self, engine: Any) -> None:
        """When the engine is about to shut down, wait for the split requests as long as it has time.

        An engine core that shuts down takes no more requests and calls, and ends once it has no request, although the
        whole request of a prompt is still to come, or reads its pages. vLLM shuts the engine down in a thread; on the
        event loop's own thread this can't wait.
        """
        if self._ends_before_engine:
            return
        self._ends_before_engine = True
        loop, loop_thread = asyncio.get_running_loop(), threading.get_ident()

        def wait(seconds: float | None) -> None:
            if not seconds or not self.split_requests or threading.get_ident() == loop_thread or not loop.is_running():
                return
            logger.info("Waiting for %d prompts that are split over replicas", len(self.split_requests))
            refuse_admission(engine, lambda: RetryableRequestError("the server is shutting down"))
            ended = asyncio.run_coroutine_threadsafe(self.split_requests.wait_until_ended(seconds), loop)
            if not ended.result():
                logger.warning("Prompts that are split over replicas still run after %.0f s: they are ended", seconds)

        around_shutdown(engine, wait)
