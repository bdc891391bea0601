"""Calls of a front to engine replicas, each of which may not answer: it hangs, or its host can't be reached."""

from __future__ import annotations

import asyncio
from typing import Any

from starling.vllm_compat.front import call_engine_core, num_engine_cores


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
