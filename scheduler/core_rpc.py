"""What a front can call in an engine core by name, with starling.vllm_compat.front.call_engine_core.

Arguments and results are plain numbers and names. A call runs between two of the engine's steps.
"""

from __future__ import annotations

from typing import Any

from starling.scheduler.cache_state import cache_state, prefill_progress
from starling.scheduler.cached_tokens import cached_tokens
from starling.scheduler.live_requests import LiveRequests
from starling.vllm_compat.engine_core import add_core_utility
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


def _live_requests(core: Any) -> dict[str, Any]:
    return core.scheduler.part(LiveRequests).look()


def add_core_rpc() -> None:
    """Offer these calls in this process's engine core."""
    add_core_utility(CACHE_STATE, _cache_state)
    add_core_utility(PREFILL_PROGRESS, _prefill_progress)
    add_core_utility(ATTENTION_BACKENDS, _attention_backends)
    add_core_utility(LIVE_REQUESTS, _live_requests)
    add_core_utility(CACHED_TOKENS, cached_tokens)
