"""What a KV page depends on under star, said in its prefix-cache key.

vLLM chains page hashes over tokens and "extra keys" (LoRA, salt, images). Star adds one more:

- a page of block 0 has the KV of dense attention: no key, so star and dense share it;
- a page of a later block, inside the context, also depends on A, B and O;
- the page that holds ``context_end`` and all after it attend globally over star-built KV: also on
  ``context_end``.

A chat's next turn has a later ``context_end`` and the same blocks, so it hits all complete context pages.

Where blocks are independent of one another (no overlap), the chain also starts anew at each block, from the anchor
and the block's place: a block between two edited ones keeps its keys. The first page behind the blocks then goes on
from the last pages of all of them, so that it still stands for everything before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vllm.v1.core import kv_cache_utils

from scheduler.plan import StarPlan, request_plan

Hasher = Callable[[Any], list[Any]]


def star_page_key(plan: StarPlan, start: int, end: int) -> tuple[str, str] | None:
    """The extra key of the page over positions ``[start, end)``, tagged like vLLM's own; None: none."""
    if start < plan.block_size:
        return None
    key = f"star:{plan.block_size}:{plan.anchor_size}:{plan.overlap_size}"
    return ("star", key if end <= plan.context_end else f"{key}:{plan.context_end}")


def restarts(plan: StarPlan, page: int) -> Iterator[int]:
    """Page numbers where a key does not go on from the page before: each later block's first page, the query's."""
    first_query_page = plan.context_end // page
    yield from range(plan.block_size // page, first_query_page, plan.block_size // page)
    yield first_query_page


def parent_pages(plan: StarPlan, page: int, number: int) -> tuple[int, ...] | None:
    """The pages whose keys the key of page ``number`` goes on from, where it restarts; None: the page before."""
    per_block, first_query_page = plan.block_size // page, plan.context_end // page
    if number == first_query_page:
        ends = {*range(per_block - 1, number, per_block), number - 1}
        return tuple(sorted(ends))
    if number < per_block or number % per_block or number > first_query_page:
        return None
    return (plan.anchor_size // page - 1,) if plan.anchor_size else ()


def independent_plan(request: Any) -> StarPlan | None:
    """The plan of a request whose blocks do not depend on one another; None: it has none, or they do.

    An image's rotary positions (M-RoPE) depend on the images before it, so prompts with any are left out.
    """
    plan = request_plan(request)
    return None if plan is None or plan.overlap_size or request.mm_features else plan


def independent_block_hasher(page: int, hash_function: Callable[[Any], bytes]) -> Hasher:
    """vLLM's request hasher, but with keys that restart at star blocks for requests that have independent ones.

    Keys must be of whole pages: ``page`` is that of the only KV cache group.
    """
    plain = kv_cache_utils.get_request_block_hasher(page, hash_function)

    def hasher(request: Any) -> list[Any]:
        plan = independent_plan(request)
        if plan is None:
            return plain(request)
        keys = list(request.block_hashes)
        known = len(keys)
        for number in range(known, request.num_tokens // page):
            start, end = number * page, (number + 1) * page
            parents = parent_pages(plan, page, number)
            if parents is None:
                parent = keys[-1] if keys else None
            else:  # vLLM has the salt in the first page alone, which a block without an anchor does not go on from
                parent = hash_function(("star", start, request.cache_salt, tuple(keys[index] for index in parents)))
            extra_keys, _ = kv_cache_utils.generate_block_hash_extra_keys(request, start, end, 0)
            tokens = request.all_token_ids[start:end]
            keys.append(kv_cache_utils.hash_block_tokens(hash_function, parent, tokens, extra_keys))
        return keys[known:]

    return hasher
