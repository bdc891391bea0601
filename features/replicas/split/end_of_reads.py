"""When the request of a split prompt reads no more pages of other replicas, so that these can free them.

The output of a response that is not streamed comes at its end alone, so the front's own state is polled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starling.vllm_compat.front import engine_request_ids, request_state

CHECK_SECONDS = 0.2
"""Seconds between the front's looks at a request."""


async def until_fetched(engine: Any, request_id: str) -> None:
    """Wait until every choice of a request has its first token, or fetches nothing more."""
    prefilling = True
    while prefilling:
        await asyncio.sleep(CHECK_SECONDS)
        states = [request_state(engine, name) for name in engine_request_ids(engine, request_id)]
        prefilling = not states or any(state is None or state.is_prefilling for state in states)


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
