"""The state of a replica for one prompt: what the front needs before it splits the prompt over replicas."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from scheduler.star.plan import StarPlan
from scheduler.star.request_metadata import KEY, RequestMetadata
from vllm_compat.scheduler_view import SchedulerView


def replica_state(
    scheduler: Any, block_hasher: Any, token_ids: list[int], plan: StarPlan, cache_salt: str | None
) -> dict[str, Any]:
    """What the replica has cached of a prompt, how busy it is, and what its KV memory is like.

    Args:
        scheduler: the replica's scheduler, with the connector between replicas.
        block_hasher: the engine core's hasher of a request's pages.
        token_ids: the prompt; without any, only the load, the memory and the layout are of use.

    Returns:
        ``cached``: numbers of the star blocks whose pages are all in the prefix cache.
        ``has_anchor``: whether the anchor's pages are.
        ``queued_tokens``: tokens that the replica's requests have yet to compute.
        ``pages``: pages of the replica's KV memory.
        ``layout``: layout of a page (replicas/page_transfer.py).
    """
    params = SamplingParams(max_tokens=1, extra_args={KEY: RequestMetadata(plan=plan).to_wire()})
    request = Request("starling-look", token_ids, params, None, cache_salt=cache_salt, block_hasher=block_hasher)
    pool, page_size = SchedulerView(scheduler).pool, scheduler.block_size
    cached = [pool.find(page_hash) is not None for page_hash in request.block_hashes]
    end = min(plan.context_end // page_size, len(cached))
    block_pages = plan.block_size // page_size
    unfinished = (request for request in scheduler.requests.values() if not request.is_finished())
    return {
        "cached": [
            star_block
            for star_block, first in enumerate(range(0, end, block_pages))
            if all(cached[first : min(first + block_pages, end)])
        ],
        "has_anchor": bool(cached) and all(cached[: plan.anchor_size // page_size]),
        "queued_tokens": sum(request.num_tokens - request.num_computed_tokens for request in unfinished),
        "pages": pool.num_pages,
        "layout": scheduler.connector.addresses[0]["layout"],
    }
