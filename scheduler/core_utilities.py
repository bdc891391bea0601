"""What a front can ask an engine core, by name, with engine_ext.compat.call_core. Plain numbers and names cross."""

from __future__ import annotations

from typing import Any

from engine_ext import compat
from scheduler.cache_state import cache_state, prefill_progress
from scheduler.plan import StarPlan
from scheduler.replica_state import replica_state

CACHE_STATE = "starling_cache_state"
PREFILL_PROGRESS = "starling_prefill_progress"
ATTENTION_BACKENDS = "starling_attention_backends"
REPLICA_STATE = "starling_replica_state"
LET_GO = "starling_let_go"
OPEN_SHARD = "starling_open_shard"


def _cache_state(core: Any, per_request: bool) -> dict[str, Any]:
    return cache_state(core.scheduler, per_request)


def _prefill_progress(core: Any, request_ids: list[str]) -> dict[str, dict[str, int]]:
    return prefill_progress(core.scheduler, request_ids)


def _attention_backends(core: Any) -> list[str]:
    of_workers = core.model_executor.collective_rpc(compat.attention_backends)
    return sorted({name for names in of_workers for name in names})


def _replica_state(core: Any, token_ids: list[int], plan: list[Any], cache_salt: str | None) -> dict[str, Any]:
    return replica_state(core.scheduler, core.request_block_hasher, token_ids, StarPlan(*plan), cache_salt)


def _open_shard(core: Any, name: str) -> list[dict[str, Any]]:
    pages = core.scheduler.connector.begin_shard(name)
    return core.model_executor.collective_rpc("open_shard", args=(name, pages))


def _let_go(core: Any, names: list[str]) -> None:
    connector = core.scheduler.connector
    opened = sorted(connector.opened.intersection(names))
    if opened:  # or a late question would be answered from pages that have gone to others
        core.model_executor.collective_rpc("close_shards", args=(opened,))
    connector.let_go(names)


def add_core_utilities() -> None:
    """Offer them in this process's engine core."""
    compat.add_core_utility(CACHE_STATE, _cache_state)
    compat.add_core_utility(PREFILL_PROGRESS, _prefill_progress)
    compat.add_core_utility(ATTENTION_BACKENDS, _attention_backends)
    compat.add_core_utility(REPLICA_STATE, _replica_state)
    compat.add_core_utility(LET_GO, _let_go)
    compat.add_core_utility(OPEN_SHARD, _open_shard)
