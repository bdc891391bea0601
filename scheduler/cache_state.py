"""Contents of the paged KV cache, and progress of prompts: from vLLM's scheduler, as plain numbers and names.

To be read between two steps. Numbers are those of one worker: with tensor parallelism each rank has the same number of
pages, which hold its part of the heads. Keys are the names of the fields in proto/starling/v1/admin.proto.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, get_kv_cache_spec_kind
from vllm.v1.request import RequestStatus

from starling.config.entry import StarlingConfig
from starling.scheduler.part import CorePart
from starling.scheduler.planning.plan import blocks_done, client_index, num_client_tokens
from starling.scheduler.planning.request_metadata import metadata_of
from starling.scheduler.provenance import cache_metrics
from starling.vllm_compat.core_process import add_core_utility
from starling.vllm_compat.kv_pages import CacheGroup
from starling.vllm_compat.scheduler_view import SchedulerView
from starling.vllm_compat.worker import attention_backends


def cache_state(scheduler: Any, per_request: bool) -> dict[str, Any]:
    """Pages of the pool and of each KV cache group, request counts, and on demand what each request holds.

    Pages are used (a request holds them), cached (free, but with content that a prompt can still hit) or
    free; these add up to the total. The pool's null page is none of them. Walks the whole pool: some
    20 ms per 100,000 pages, in which the engine makes no step.
    """
    view = SchedulerView(scheduler)
    cached_of_group = Counter(view.pool.cached_free_pages())
    cached, free = cached_of_group.total(), view.pool.num_free_pages
    running, waiting = scheduler.get_request_counts()
    state = {
        "pages_total": view.pool.num_pages,
        "pages_used": view.pool.num_pages - free,
        "pages_cached": cached,
        "pages_free": free - cached,
        "requests_running": running,
        "requests_waiting": waiting,
        "groups": [
            group_state(group) | {"pages_cached": cached_of_group[index], "states_used": states_used(scheduler, group)}
            for index, group in enumerate(view.groups)
        ],
    }
    state |= capacity(scheduler)
    if per_request:
        states = (request_state(view, request) for request in scheduler.requests.values())
        state["requests"] = [found for found in states if found is not None]
    return state


def is_compressed(spec: Any) -> bool:
    """Return whether one state of a cache represents several tokens."""
    return isinstance(spec, AttentionSpec) and spec.tokens_per_state > 1


def compressed_groups(scheduler: Any) -> list[CacheGroup]:
    """Return the KV cache groups whose states represent several tokens each."""
    return [group for group in SchedulerView(scheduler).groups if is_compressed(group.spec)]


def capacity(scheduler: Any) -> dict[str, int]:
    """Tokens that the cache holds, and, where a group is compressed, those it would hold with one state for each token.

    The latter counts the bytes of the compressed groups' states alone: padding, and windows of tokens that are not
    compressed yet, are costs of the compression.
    """
    found = {}
    if (tokens := scheduler.vllm_config.cache_config.kv_cache_size_tokens) is not None:
        found["capacity_tokens"] = tokens
    view = SchedulerView(scheduler)
    token_bytes = sum(
        len(group.layer_names) * group.spec.real_page_size_bytes // group.spec.num_states
        for group in view.groups
        if is_compressed(group.spec)
    )
    if token_bytes:
        page_bytes = max(len(group.layer_names) * group.spec.page_size_bytes for group in view.groups)
        found["uncompressed_capacity_tokens"] = (view.num_blocks - 1) * page_bytes // token_bytes
    return found


def states_of(spec: Any, num_computed_tokens: int, num_pages: int) -> int:
    """States of so many tokens in so many pages: one a token, one per complete chunk of tokens, or one a page."""
    room = num_pages * spec.num_states
    if not isinstance(spec, AttentionSpec):
        return room
    return min(int(num_computed_tokens / spec.tokens_per_state), room)


def states_used(scheduler: Any, group: CacheGroup) -> int:
    """States of a group that requests hold; a state that several requests hold counts for each."""
    held = ((request, group.num_pages(name)) for name, request in scheduler.requests.items())
    return sum(
        states_of(group.spec, SchedulerView.computed_tokens(request), num_pages)
        for request, num_pages in held
        if num_pages
    )


def group_state(group: CacheGroup) -> dict[str, Any]:
    """Shape of a group's pages, and how many of them requests hold; a page that several requests hold counts once.

    ``compression`` is the bytes a token would take with a state of its own, divided by those it takes. A group whose
    states represent the whole sequence so far (Mamba) has neither that nor tokens per state.
    """
    spec = group.spec
    state = {
        "kind": get_kv_cache_spec_kind(spec).value,
        "layers": len(group.layer_names),
        "page_bytes": spec.page_size_bytes * len(group.layer_names),
        "page_tokens": group.page_size,
        "page_states": spec.num_states,
        "pages_used": group.num_held_pages(),
    }
    if isinstance(spec, AttentionSpec):
        state["tokens_per_state"] = float(spec.tokens_per_state)
        state["compression"] = spec.block_size / spec.num_states
        state["bytes_per_token"] = state["page_bytes"] / group.page_size
    return state


def request_state(view: SchedulerView, request: Any) -> dict[str, Any] | None:
    """Return what one request holds, or None if it neither runs nor holds a page.

    States are the K/V states in its pages: one a token, one per complete chunk of tokens in a compressed group, one a
    page where a state represents the sequence so far.
    """
    computed = view.computed_tokens(request)
    held = [(group, group.num_pages(request.request_id)) for group in view.groups]
    if request.status != RequestStatus.RUNNING and not any(num_pages for _, num_pages in held):
        return None
    state = {
        "engine_request_id": request.request_id,
        "status": request.status.name.lower(),
        "computed_tokens": computed,
        "prompt_tokens": request.num_prompt_tokens,
        "groups": [{"pages": pages, "states": states_of(group.spec, computed, pages)} for group, pages in held],
    }
    cached = view.cached_tokens(request)
    return state if cached is None else state | {"cached_tokens": cached}


def prefill_progress(scheduler: Any, request_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the progress of these requests' prompts, by the engine's request id, without unknown and ended ones.

    ``computed`` of ``prompt`` tokens are done, ``cached`` of them came from the prefix cache. A star request
    also has done ``star_blocks_done`` of ``star_blocks``, which hold its first ``context`` tokens; a dense one
    has 0 for these. A request that is one replica's part of a prompt (``part``) reports what it adds to the whole;
    one that only computes the anchor once more adds nothing, and is left out.
    """
    found = ((name, scheduler.requests.get(name)) for name in request_ids)
    known = ((name, request) for name, request in found if request is not None and not request.is_finished())
    states = ((name, progress_of(request)) for name, request in known)
    return {name: progress for name, progress in states if progress is not None}


def progress_of(request: Any) -> dict[str, int] | None:
    """Return one request's entry of ``prefill_progress``, or None if it only computes the anchor once more."""
    metadata = metadata_of(request)
    plan, part = metadata.plan, metadata.part
    if part is not None and plan is None:
        return None
    start = part.start if part else 0
    computed = min(SchedulerView.computed_tokens(request), request.num_prompt_tokens)
    own = max(computed, start)
    cached = max((SchedulerView.cached_tokens(request) or 0) - start, 0)
    done = client_index(plan, own) - client_index(plan, start) if plan else own - start
    return {
        "computed": done,
        "prompt": num_client_tokens(plan) if plan else request.num_prompt_tokens,
        # As in a response's statistics: padding that was computed is no cache hit.
        "cached": max(done - (own - start - cached), 0),
        "context": plan.client_starts[-1] if plan else 0,
        "star_blocks_done": blocks_done(plan, own) - blocks_done(plan, start) if plan else 0,
        "star_blocks": len(plan.starts) if plan else 0,
        "part": int(part is not None),
    }


class CompressedCache(CorePart):
    """Series of a compressed KV cache: its size, and after each step the states that requests hold."""

    def __init__(self, scheduler: Any, groups: Sequence[CacheGroup]) -> None:
        self.scheduler = scheduler
        self.groups = groups

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> CompressedCache | None:
        groups = compressed_groups(scheduler)
        if not groups:
            return None
        metrics = cache_metrics()
        state = cache_state(scheduler, per_request=False)
        for index, group in enumerate(state["groups"]):
            metrics.bytes_per_token.labels(str(index), group["kind"]).set(group.get("bytes_per_token", 0))
        for cache, field in (("compressed", "capacity_tokens"), ("uncompressed", "uncompressed_capacity_tokens")):
            metrics.capacity.labels(cache).set(state.get(field, 0))
        return cls(scheduler, groups)

    def outputs(self, outputs: dict[int, Any]) -> None:
        cache_metrics().states.set(sum(states_used(self.scheduler, group) for group in self.groups))


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
