"""Prefix-cache keys of KV pages under star, whose KV depends on more than the tokens before.

vLLM chains page hashes over tokens and "extra keys" (LoRA, salt, images). Star adds one more:

- a page of block 0 has the KV of dense attention: no key, so star and dense requests share it;
- a page of a later block, inside the context, also depends on A, B and O, and on which KV heads are dense;
- the page that holds ``context_end`` and all pages after it attend globally over star-built KV: they also depend on
  ``context_end``.

A chat's next turn has a later ``context_end`` and the same blocks, so it hits all complete context pages.

Where blocks are independent of one another (no overlap, no dense heads), the chain also starts anew at each block, from
the anchor and the block's position: a block between two edited blocks keeps its keys. Where blocks have positions of
their own, it starts from the anchor alone: a block has its keys wherever it stands. The chain of the first query page
continues from the last pages of all blocks, so that its key stands for everything before it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import metadata_of
from starling.vllm_compat.prefix_cache import (
    Hasher,
    HashFunction,
    extra_page_keys,
    hash_page,
    plain_request_hasher,
    without_salt,
)


def page_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """Return the extra keys of a request's page over positions ``[start, end)``: one, or none."""
    plan = metadata_of(request).plan
    key = None if plan is None else star_page_key(plan, start, end)
    return () if key is None else (key,)


def star_page_key(plan: StarPlan, start: int, end: int) -> tuple[str, str] | None:
    """Return the extra key of the page over positions ``[start, end)``, tagged like vLLM's, or None if it has none."""
    key = plan.page_key(start, end)
    return None if key is None else ("star", f"star:{key}")


def chain_restarts(plan: StarPlan, page_size: int, start: int) -> Iterator[int]:
    """Yield the pages whose key does not continue that of the page before: the first of later blocks and the query.

    Args:
        start: a position; only pages behind it.
    """
    first_query_page = plan.context_end // page_size
    later = (plan.starts[number] // page_size for number in range(bisect_right(plan.starts, start), len(plan.starts)))
    yield from itertools.takewhile(lambda page: page < first_query_page, later)
    if first_query_page * page_size > start:
        yield first_query_page


def parent_pages(plan: StarPlan, page_size: int, page: int) -> tuple[int, ...] | None:
    """Return the pages whose keys a page's key continues where the chain restarts, or None if it is the page before.

    Pages are counted from the start of the prompt.
    """
    start, first_query_page = page * page_size, plan.context_end // page_size
    if page == first_query_page:
        ends = {page - 1, *(border // page_size - 1 for border in plan.starts if border <= start)}
        return tuple(sorted(ends - {-1}))
    if page > first_query_page or start < plan.head_end or plan.starts[plan.block_of(start)] != start:
        return None
    return (plan.anchor_size // page_size - 1,) if plan.anchor_size else ()


def independent_plan(request: Any) -> StarPlan | None:
    """Return the plan of a request whose star blocks are independent, or None if it has none, or they are not.

    The rotary positions of an image (M-RoPE) depend on the images before it, so prompts with images are left out.
    """
    plan = metadata_of(request).plan
    return None if plan is None or not plan.is_independent or request.mm_features else plan


def independent_block_hasher(page_size: int, hash_function: HashFunction) -> Hasher:
    """Request hasher as vLLM's, with keys whose chain restarts at star blocks that are independent.

    Args:
        page_size: of the only KV cache group; keys are those of whole pages.

    Returns:
        A function from a request to the keys of the pages completed since its last call. It does no work where no page
        was completed, so that a generated token costs nothing.
    """
    plain = plain_request_hasher(page_size, hash_function)

    def hasher(request: Any) -> list[Any]:
        known = request.block_hashes
        first, stop = len(known), request.num_tokens // page_size
        if stop <= first:
            return []
        plan = independent_plan(request)
        if plan is None:
            return plain(request)
        keys: list[Any] = []

        def key_of(page: int) -> Any:
            return known[page] if page < first else keys[page - first]

        for page in range(first, stop):
            start, end = page * page_size, (page + 1) * page_size
            parents, extra = parent_pages(plan, page_size, page), extra_page_keys(request, start, end)
            if parents is None:
                parent = key_of(page - 1) if page else None
            else:  # vLLM has the salt in the first page alone, which the chain of a block without an anchor leaves out
                place = None if plan.documents else start
                parent = hash_function(("star", place, request.cache_salt, tuple(map(key_of, parents))))
                extra = without_salt(extra)  # the first page may be a block, which has its key elsewhere too
            keys.append(hash_page(hash_function, parent, request.all_token_ids[start:end], extra))
        return keys

    return hasher
