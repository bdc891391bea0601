"""What a replica has of a prompt already, and how busy it is: asked by the front before it splits the prompt."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from scheduler.plan import PLAN_KEY, StarPlan


def replica_state(
    scheduler: Any, block_hasher: Any, token_ids: list[int], plan: StarPlan, cache_salt: str | None
) -> dict[str, Any]:
    """Star blocks of the prompt that are cached in full, the anchor, queued tokens, and the pages: layout and number.

    Empty ``token_ids`` ask for the load and the layout alone.
    """
    params = SamplingParams(max_tokens=1, extra_args={PLAN_KEY: plan.to_wire()})
    request = Request("starling-look", token_ids, params, None, cache_salt=cache_salt, block_hasher=block_hasher)
    pool, page = scheduler.kv_cache_manager.block_pool, scheduler.block_size
    cached = [pool.get_cached_block(block_hash, [0]) is not None for block_hash in request.block_hashes]
    end = min(plan.context_end // page, len(cached))
    pages = plan.block_size // page
    return {
        "cached": [
            block
            for block, first in enumerate(range(0, end, pages))
            if all(cached[first : min(first + pages, end)])
        ],
        "has_anchor": bool(cached) and all(cached[: plan.anchor_size // page]),
        "queued_tokens": sum(
            other.num_tokens - other.num_computed_tokens
            for other in scheduler.requests.values()
            if not other.is_finished()
        ),
        "pages": pool.num_gpu_blocks - 1,
        "layout": scheduler.connector.addresses[0]["layout"] if scheduler.connector else {},
    }  # fmt: skip
