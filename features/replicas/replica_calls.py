"""Calls of a front by name in the engine core of a replica, by starling.vllm_compat.front.call_engine_core.

Arguments and results are plain numbers, names, bytes, lists and dicts. A call runs between two of the engine's steps.
vLLM sends a result that is a Future once it is there, and the engine makes steps until then.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import msgspec

from starling.features.replicas.replica_state import replica_state
from starling.features.replicas.worker import close_shards, open_shard
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import metadata_of
from starling.vllm_compat.core_process import add_core_utility

REPLICA_STATE = "starling_replica_state"
OPEN_SHARD = "starling_open_shard"
RELEASE = "starling_release"
PING = "starling_ping"


def _replica_state(
    core: Any, token_ids: list[int], plan: dict[str, Any], cache_salt: str | None, adapter: list[Any] | None
) -> Future[dict[str, Any]]:
    hasher = core.request_block_hasher
    return replica_state(core.scheduler, hasher, token_ids, msgspec.convert(plan, StarPlan), cache_salt, adapter)


def _open_shard(core: Any, name: str) -> list[dict[str, Any]]:
    page_ids = core.scheduler.connector.begin_shard(name)
    return core.model_executor.collective_rpc(open_shard, args=(name, page_ids))


def _release(core: Any, names: list[str]) -> None:
    if running := parts_running(core.scheduler, names):
        core.abort_requests(running)  # else they would hold their pages later, for good
    connector = core.scheduler.connector
    opened = sorted(connector.opened_shards.intersection(names))
    if opened:  # an open shard would answer a late query from pages that belong to other requests by then
        core.model_executor.collective_rpc(close_shards, args=(opened,))
    connector.release(names)


def _ping(core: Any) -> None:
    """Answer between two steps."""


def parts_running(scheduler: Any, names: list[str]) -> list[str]:
    """Ids of the requests that would hold pages under these names once they are complete."""
    parts = ((request_id, metadata_of(request).part) for request_id, request in scheduler.requests.items())
    return [request_id for request_id, part in parts if part is not None and part.name in names]


def add_replica_rpc() -> None:
    """Offer these calls in this process's engine core."""
    add_core_utility(REPLICA_STATE, _replica_state)
    add_core_utility(OPEN_SHARD, _open_shard)
    add_core_utility(RELEASE, _release)
    add_core_utility(PING, _ping)
