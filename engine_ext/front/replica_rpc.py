"""Calls of a front to one engine replica, which may not answer: it hangs, or its host can't be reached."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm_compat.front import DEATH_CHECK_SECONDS, call_engine_core


class ReplicaTimeout(Exception):
    """A replica has not answered in time."""

    def __init__(self, rank: int, seconds: float) -> None:
        super().__init__(f"replica {rank} has not answered for {seconds:g} s")


class ReplicaRPC:
    """The calls to the replicas of one engine.

    Args:
        timeout: seconds within which a replica has to answer. It answers between two of its steps.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._unanswered: dict[int, asyncio.Future] = {}

    def is_unresponsive(self, rank: int) -> bool:
        """Whether a replica still owes the answer to a call that timed out."""
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
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.timeout
        while not (await asyncio.wait({call}, timeout=DEATH_CHECK_SECONDS))[0]:
            if engine.errored:
                call.cancel()
                raise engine.dead_error
            if clock() > deadline:
                self._unanswered[rank] = call
                raise ReplicaTimeout(rank, self.timeout)
        return call.result()
