"""Look up a prompt's tokens in the prefix cache of an engine core, for a router that chooses among servers.

The pages' keys are made on a thread of their own, since they take milliseconds for a long prompt: the engine goes on
with its steps. No page is held, so the answer is that of a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from starling.features.reuse.block_reuse import has_holes
from starling.scheduler.star.client_tokens import pad
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import KEY, RequestMetadata

_threads = ThreadPoolExecutor(1, thread_name_prefix="starling-keys")


def cached_tokens(
    core: Any, token_ids: list[int], metadata: dict[str, Any], salt: str | None, adapter: list[Any] | None
) -> dict[str, Any] | Future[dict[str, Any]]:
    """Count the tokens of a prompt that are cached, in all and of each document.

    Args:
        core: vLLM's EngineCore.
        token_ids: of the prompt as the client sent it.
        metadata: of the request, with its plan (RequestMetadata.to_wire).
        adapter: name, number and path of the LoRA adapter; None: the base model.

    Returns:
        ``{"cached_tokens": N, "documents": [{"tokens": N, "cached_tokens": N}, ...]}``, where ``documents`` leaves out
        the head; or ``{"refusal": why}``.
    """
    group = core.scheduler.view.only_group
    if core.request_block_hasher is None:
        return {"refusal": "prefix caching is off"}
    if group is None:
        return {"refusal": "the KV cache has several groups of layers"}
    plan = RequestMetadata.from_wire(metadata).plan
    padded = token_ids if plan is None else pad(plan, token_ids)
    lora = None if adapter is None else LoRARequest(*adapter)

    def look_up() -> dict[str, Any]:
        try:
            request = Request(
                request_id="starling-cached",
                prompt_token_ids=padded,
                sampling_params=SamplingParams(extra_args={KEY: metadata}),
                pooling_params=None,
                cache_salt=salt,
                lora_request=lora,
                block_hasher=core.request_block_hasher,
            )
        except OverflowError:  # since vLLM 0.34, of a token above 32 bits, which no cached page has
            return counted(plan, group.page_size, [])
        cached = core.scheduler.view.pool.are_cached(request.block_hashes, group.index)
        found = cached if has_holes(core.scheduler, request) else list(takewhile(bool, cached))
        return counted(plan, group.page_size, found)

    return _threads.submit(look_up)


def counted(plan: StarPlan | None, page_size: int, cached: Sequence[bool]) -> dict[str, Any]:
    """Return the result of ``cached_tokens`` for a prompt whose pages are cached or not."""
    if plan is None or not plan.documents:
        return {"cached_tokens": sum(cached) * page_size, "documents": []}

    def tokens_of(start: int, stop: int) -> int:
        """Count the cached tokens of a span that starts with a page; padding may follow it."""
        pages = range(start // page_size, min(-(-stop // page_size), len(cached)))
        return sum(min((page + 1) * page_size, stop) - page * page_size for page in pages if cached[page])

    spans = [*plan.documents, (plan.context_end, plan.num_prompt_tokens)]
    found = {start: tokens_of(start, stop) for start, stop in spans}
    documents = [{"tokens": stop - start, "cached_tokens": found[start]} for start, stop in plan.documents_behind_head]
    return {"cached_tokens": sum(found.values()), "documents": documents}
