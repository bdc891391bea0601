"""When the request of a split prompt reads no more pages of other replicas, so that these can free them.

The output of a response that is not streamed comes at its end alone, so the front's own state is polled.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from vllm.logger import init_logger

from starling.features.replicas.split.engine_replica import EngineReplica
from starling.features.replicas.split.replica import Replica
from starling.features.replicas.split.replica_rpc import ReplicaPaused, ReplicaUnavailable
from starling.vllm_compat.front import engine_request_ids, request_state

logger = init_logger("vllm.starling")

CHECK_SECONDS = 0.2
"""How often the front looks at a request."""

RENEW_SECONDS = 5.0
"""How often the front asks whether the pages that a request is about to fetch are still held."""


async def until_fetched(engine: Any, request_id: str, reader: EngineReplica, holders: Sequence[Replica]) -> None:
    """Wait until every choice of a request has its first token, or fetches nothing more.

    If a holder loses its pages, the rest is not fetched. Until then the time in which the fetch may begin is extended:
    the request may wait for its turn. But other servers' memory does not wait until a paused engine is resumed, or one
    that hangs is back.

    Args:
        reader: the replica that runs the request.
        holders: the replicas whose pages it fetches.
    """
    loop = asyncio.get_running_loop()
    renewed = loop.time()
    prefilling = True
    while prefilling:
        await asyncio.sleep(CHECK_SECONDS)
        names = engine_request_ids(engine, request_id)
        if any(holder.has_lost_pages for holder in holders):
            await reader.cancel_fetch(names)
        elif names and loop.time() - renewed >= RENEW_SECONDS:
            renewed = loop.time()
            try:
                deadline = await renew_all(holders)
                if math.isfinite(deadline):
                    await reader.extend_fetch(names, deadline)
            except ReplicaPaused as error:
                logger.warning("%s: %s: it computes what it has not fetched", request_id, error)
                await reader.cancel_fetch(names)
                return
            except ReplicaUnavailable as error:
                if reader.has_failed:  # a fetch that goes on when it is back finds that the pages were released
                    logger.warning("%s: %s: it computes what it has not fetched", request_id, error)
                    await reader.cancel_fetch(names)
                    return
        states = [request_state(engine, name) for name in names]
        prefilling = not states or any(state is None or state.is_prefilling for state in states)


async def renew_all(holders: Sequence[Replica]) -> float:
    """Until when a fetch from all of these replicas may begin (features/replicas/clock.py).

    Raises:
        ReplicaUnavailable: the pages of one of them may be gone.
    """
    answers = await asyncio.gather(*(holder.renew() for holder in holders), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return min(answer for answer in answers if not isinstance(answer, BaseException))


async def until_ended(engine: Any, request_id: str, has_output: Callable[[], bool]) -> None:
    """Wait until the engine has ended a request.

    Args:
        has_output: whether the request has had an output: it may have ended before this is called.
    """
    seen = False
    while (names := engine_request_ids(engine, request_id)) or not (seen or has_output()):
        seen = seen or bool(names)
        await asyncio.sleep(CHECK_SECONDS)
    await asyncio.sleep(CHECK_SECONDS)  # the front aborts a request that ends at a stop string a little later
