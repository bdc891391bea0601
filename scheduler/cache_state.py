"""What the paged KV cache holds, and how far prompts are: read from vLLM's scheduler, as plain numbers and names.

To be read between two steps. Numbers are those of one worker: with tensor parallelism each rank has as many
pages, of its share of the heads. Keys are the names of the fields in proto/starling/v1/admin.proto.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.kv_cache_interface import AttentionSpec, get_kv_cache_spec_kind
from vllm.v1.request import RequestStatus

from scheduler.plan import request_plan
from scheduler.share import part_of


def cache_state(scheduler: Any, per_request: bool) -> dict[str, Any]:
    """Pages of the pool and of each KV cache group, request counts, and on demand what each request holds.

    Pages are used (a request holds them), cached (free, but with content that a prompt can still hit) or
    free; these add up to the total. The pool's null page is none of them. Walks the whole pool: some
    20 ms per 100,000 pages, in which the engine makes no step.
    """
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    held = [block for block in pool.blocks if block.ref_cnt == 0 and not block.is_null and block.block_hash is not None]
    cached_of_group = Counter(get_group_id(block.block_hash) for block in held)
    total, available = pool.num_gpu_blocks - 1, pool.get_num_free_blocks()
    running, waiting = scheduler.get_request_counts()
    state = {
        "pages_total": total,
        "pages_used": total - available,
        "pages_cached": len(held),
        "pages_free": available - len(held),
        "requests_running": running,
        "requests_waiting": waiting,
        "groups": [
            group_state(group, of_group)
            | {
                "pages_cached": cached_of_group[index],
                "states_used": states_used(scheduler, group.kv_cache_spec, of_group),
            }
            for index, (group, of_group) in enumerate(_groups(scheduler))
        ],
    }
    state |= capacity(scheduler)
    if per_request:
        states = (request_state(scheduler, request) for request in scheduler.requests.values())
        state["requests"] = [found for found in states if found is not None]
    return state


def is_compressed(spec: Any) -> bool:
    """Whether one state of a cache stands for several tokens."""
    return isinstance(spec, AttentionSpec) and spec.tokens_per_state > 1


def compressed_groups(scheduler: Any) -> list[tuple[Any, Any]]:
    """(KVCacheGroupSpec, its manager) of each compressed group."""
    return [(group, manager) for group, manager in _groups(scheduler) if is_compressed(group.kv_cache_spec)]


def capacity(scheduler: Any) -> dict[str, int]:
    """Tokens that the cache holds, and where a group is compressed, those it would with a state of its own for each.

    The latter have the bytes of the compressed groups' states alone: windows of what is not compressed yet and padding
    are what compression costs.
    """
    found = {}
    if (tokens := scheduler.vllm_config.cache_config.kv_cache_size_tokens) is not None:
        found["capacity_tokens"] = tokens
    groups = scheduler.kv_cache_config.kv_cache_groups
    token = sum(
        len(group.layer_names) * group.kv_cache_spec.real_page_size_bytes // group.kv_cache_spec.num_states
        for group in groups
        if is_compressed(group.kv_cache_spec)
    )
    if token:
        page = max(len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in groups)
        found["uncompressed_capacity_tokens"] = (scheduler.kv_cache_config.num_blocks - 1) * page // token
    return found


def states_of(spec: Any, computed: int, pages: int) -> int:
    """States of ``computed`` tokens in so many pages: one a token, one per complete chunk of tokens, or one a page."""
    room = pages * spec.num_states
    return min(int(computed / spec.tokens_per_state), room) if isinstance(spec, AttentionSpec) else room


def states_used(scheduler: Any, spec: Any, manager: Any) -> int:
    """States of a group that requests hold; those that several share count for each."""
    held = ((request, manager.req_to_blocks.get(name, ())) for name, request in scheduler.requests.items())
    pages = ((request, sum(not block.is_null for block in blocks)) for request, blocks in held)
    return sum(states_of(spec, computed_tokens(request), count) for request, count in pages if count)


def _groups(scheduler: Any) -> Sequence[tuple[Any, Any]]:
    """(KVCacheGroupSpec, its manager) of each KV cache group."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return list(zip(scheduler.kv_cache_config.kv_cache_groups, managers, strict=True))


def group_state(group: Any, manager: Any) -> dict[str, Any]:
    """Shape of a group's pages, and how many of them requests hold; a page that several share counts once.

    ``compression`` is the bytes a token would take with a state of its own over those it takes. A group whose
    states stand for the whole sequence so far (Mamba) has neither it nor tokens per state.
    """
    spec = group.kv_cache_spec
    held = {block.block_id for blocks in manager.req_to_blocks.values() for block in blocks if not block.is_null}
    state = {
        "kind": get_kv_cache_spec_kind(spec).value,
        "layers": len(group.layer_names),
        "page_bytes": spec.page_size_bytes * len(group.layer_names),
        "page_tokens": manager.block_size,
        "page_states": spec.num_states,
        "pages_used": len(held),
    }
    if isinstance(spec, AttentionSpec):
        state["tokens_per_state"] = float(spec.tokens_per_state)
        state["compression"] = spec.block_size / spec.num_states
        state["bytes_per_token"] = state["page_bytes"] / manager.block_size
    return state


def computed_tokens(request: Any) -> int:
    """Tokens whose step has come back; vLLM counts those in flight as computed."""
    return max(0, request.num_computed_tokens - request.num_in_flight_tokens)


def cached_tokens(request: Any) -> int | None:
    """Prompt tokens found in the prefix cache; None after the first token, when vLLM has handed the number on."""
    stats = request.prefill_stats
    return None if stats is None else stats.num_cached_tokens


def request_state(scheduler: Any, request: Any) -> dict[str, Any] | None:
    """What one request holds; None where it neither runs nor holds a page.

    States are the K/V states in its pages: one a token, one per chunk of tokens in a compressed group (of its
    complete chunks), one a page where a state stands for the sequence so far.
    """
    computed = computed_tokens(request)
    groups = []
    for group, manager in _groups(scheduler):
        pages = sum(not block.is_null for block in manager.req_to_blocks.get(request.request_id, ()))
        groups.append({"pages": pages, "states": states_of(group.kv_cache_spec, computed, pages)})
    if request.status != RequestStatus.RUNNING and not any(group["pages"] for group in groups):
        return None
    state = {
        "engine_request_id": request.request_id,
        "status": request.status.name.lower(),
        "computed_tokens": computed,
        "prompt_tokens": request.num_prompt_tokens,
        "groups": groups,
    }
    cached = cached_tokens(request)
    return state if cached is None else state | {"cached_tokens": cached}


def prefill_progress(scheduler: Any, request_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """How far the prompts of these requests are, by the engine's request id; unknown and ended ones are left out.

    ``computed`` of ``prompt`` tokens are done, ``cached`` of them came from the prefix cache. A star request
    also has done ``star_blocks_done`` of ``star_blocks``, which hold its first ``context`` tokens; a dense one
    has 0 for these. A request that is one replica's part of a prompt tells what it adds to the whole (``part``);
    one that computes the anchor once more adds nothing, and is left out.
    """
    found = ((name, scheduler.requests.get(name)) for name in request_ids)
    known = ((name, request) for name, request in found if request is not None and not request.is_finished())
    told = ((name, _progress(request)) for name, request in known)
    return {name: progress for name, progress in told if progress is not None}


def _progress(request: Any) -> dict[str, int] | None:
    plan, part = request_plan(request), part_of(request)
    if part is not None and plan is None:
        return None
    start = part.start if part else 0
    computed = min(computed_tokens(request), request.num_prompt_tokens)
    own = max(computed, start)
    return {
        "computed": own - start,
        "prompt": plan.num_prompt_tokens if plan else request.num_prompt_tokens,
        "cached": max((cached_tokens(request) or 0) - start, 0),
        "context": plan.context_end if plan else 0,
        "star_blocks_done": plan.blocks_done(own) - plan.blocks_done(start) if plan else 0,
        "star_blocks": plan.num_star_blocks if plan else 0,
        "part": int(part is not None),
    }
