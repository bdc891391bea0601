"""Calls of a front by name in an engine core, with starling.vllm_compat.front.call_engine_core.

Arguments and results are plain numbers and names. A call runs between two of the engine's steps.
"""

from __future__ import annotations

from typing import Any

from starling.scheduler.cache_state import cache_state, prefill_progress
from starling.vllm_compat.core_process import add_core_utility
from starling.vllm_compat.worker import attention_backends

CACHE_STATE = "starling_cache_state"
PREFILL_PROGRESS = "starling_prefill_progress"
ATTENTION_BACKENDS = "starling_attention_backends"
LIVE_REQUESTS = "starling_live_requests"
CACHED_TOKENS = "starling_cached_tokens"


def _cache_state(core: Any, per_request: bool) -> dict[str, Any]:
    return cache_state(core.scheduler, per_request)


def _prefill_progress(core: Any, request_ids: list[str]) -> dict[str, dict[str, int]]:
    return prefill_progress(core.scheduler, request_ids)


def _attention_backends(core: Any) -> list[str]:
    of_workers = core.model_executor.collective_rpc(attention_backends)
    return sorted({name for names in of_workers for name in names})


def add_core_rpc() -> None:
    """Offer the calls that need no feature in this process's engine core; features offer their own."""
    add_core_utility(CACHE_STATE, _cache_state)
    add_core_utility(PREFILL_PROGRESS, _prefill_progress)
    add_core_utility(ATTENTION_BACKENDS, _attention_backends)
