"""Reuse of star blocks in the engine core, and what is cached of a prompt, which a front may ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, takewhile
from typing import Any

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from starling.config.entry import StarlingConfig
from starling.config.scheduling import MIN_CHUNK
from starling.features.retention.core import RetainedPages
from starling.scheduler.cache_keys import chain_restarts, independent_block_hasher, independent_plan
from starling.scheduler.cache_state import CACHED_TOKENS
from starling.scheduler.part import CorePart
from starling.scheduler.planning.facts import dependence
from starling.scheduler.planning.plan import StarPlan, pad
from starling.scheduler.planning.request_metadata import KEY, OWN_CONNECTORS, RequestMetadata, metadata_of
from starling.scheduler.provenance import Provenance, scheduler_metrics
from starling.vllm_compat.core_process import add_core_utility
from starling.vllm_compat.kv_pages import CacheGroup, Page
from starling.vllm_compat.prefix_cache import count_cached_tokens, use_request_hasher
from starling.vllm_compat.scheduler_view import SchedulerView

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


logger = init_logger("vllm.starling")


def reuse_refusal(vllm_config: Any) -> str | None:
    """Why star blocks can't be adopted behind a hole, as far as the configuration says; None: they can."""
    if not vllm_config.cache_config.enable_prefix_caching:
        return "prefix caching is off"
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector not in OWN_CONNECTORS:
        return "the KV connector expects a request's pages to be computed in order"
    if vllm_config.speculative_config is not None:
        return "with speculative decoding a page's key may cover tokens behind the page"
    if vllm_config.aux_output_config.enabled:
        return "routed experts are returned for tokens in the order in which they are computed"
    return dependence(vllm_config.model_config)


def has_holes(scheduler: Any, request: Any) -> bool:
    """Return whether cached pages of a request count wherever they stand, and not only at its start."""
    return scheduler.part(BlockReuse) is not None and independent_plan(request) is not None


def num_cached_tokens(scheduler: Any, request: Any) -> int:
    """Prompt tokens that need no computing as the cache is now; 0 where the cache has several groups."""
    view: SchedulerView = scheduler.view
    group = view.only_group
    if group is None or not view.may_hit(request):
        return 0
    remote = metadata_of(request).remote
    if remote is not None:
        return remote.span()[1]
    if has_holes(scheduler, request):
        return sum(view.pool.are_cached(request.block_hashes, group.index)) * group.page_size
    return len(view.pool.find_run(request.block_hashes, group.index)) * group.page_size


class BlockReuse(CorePart):
    """Adopts cached pages for the star requests of one scheduler.

    The ids of adopted pages are kept here until the step that reports them to the worker.

    Args:
        group: the only KV cache group.

    Attributes:
        on_adopted: each is called with a request, the number of the first page that it adopts, and these pages.
    """

    def __init__(self, view: SchedulerView, group: CacheGroup) -> None:
        self.view = view
        self.group = group
        self.page_size = group.page_size
        self.requests: dict[str, Any] = {}
        self.unreported: dict[str, list[int]] = {}
        self.on_adopted: list[Callable[[Any, int, Sequence[Page]], None]] = []

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> BlockReuse | None:
        made = cls._made(scheduler) if config.scheduling.star_block_reuse == "on" else None
        use_request_hasher(None if made is None else independent_block_hasher)
        return made

    @classmethod
    def _made(cls, scheduler: Any) -> BlockReuse | None:
        group = scheduler.view.only_group
        refusal = reuse_refusal(scheduler.vllm_config) or (
            None if group else "the KV cache has several groups of layers"
        )
        if refusal is not None:
            logger.info("Reuse of star blocks behind an edit is off: %s", refusal)
            return None
        made = cls(scheduler.view, group)
        count_cached_tokens(
            scheduler.view.manager,
            lambda request: None if independent_plan(request) is None else num_cached_tokens(scheduler, request),
        )
        provenance, retention = scheduler.part(Provenance), scheduler.part(RetainedPages)
        made.on_adopted += [] if provenance is None else [provenance.take]
        made.on_adopted += [] if retention is None else [retention.note_adopted]
        return made

    def added(self, request: Any) -> None:
        """Adopt pages for a request from now on, where it has independent star blocks and may read the cache."""
        if independent_plan(request) is not None and self.view.may_hit(request):
            self.requests[request.request_id] = request

    def pages_freed(self, request: Any) -> None:
        """There is nothing left to report."""
        self.unreported.pop(request.request_id, None)

    def before_step(self) -> None:
        if self.requests and not self.view.is_paused:
            scheduler_metrics().count_hit("block", self.adopt_all())

    def adopt_all(self) -> int:
        """Adopt all pages that can be adopted; returns the tokens that need no computing.

        Called before a step is scheduled, so that no adopted page has content which that step would have to compute
        first.
        """
        adopted = 0
        for request_id, request in list(self.requests.items()):
            if request.is_finished():
                del self.requests[request_id]
            elif request.status == RequestStatus.RUNNING:
                adopted += self._adopt(request)
        return adopted

    def _adopt(self, request: Any) -> int:
        first = request.num_computed_tokens // self.page_size
        last = (request.num_tokens - 1) // self.page_size  # one token must be left to compute
        if first >= last or not self.view.is_at_page_border(self.group, request):
            return 0
        found = self.view.pool.find_run(islice(request.block_hashes, first, last), self.group.index)
        if not found:
            return 0
        tokens = self.view.adopt(self.group, request, found)
        # The statistics leave out parts of a prompt that another replica asked for.
        self.view.count_hit(request, tokens, in_statistics=metadata_of(request).part is None)
        for note in self.on_adopted:
            note(request, first, found)
        self.unreported.setdefault(request.request_id, []).extend(page.block_id for page in found)
        return tokens

    def bound(self, request: Any, start: int, num_tokens: int) -> int:
        """End a chunk where the pages of a star block, or of the query, are cached: they can be adopted there."""
        min_chunk = MIN_CHUNK if self.view.has_decode_graphs else 1
        if num_tokens <= min_chunk or request.request_id not in self.requests:
            return num_tokens
        plan = independent_plan(request)
        if plan is None or start >= plan.context_end:
            return num_tokens
        last = (request.num_tokens - 1) // self.page_size
        for page in chain_restarts(plan, self.page_size, start):
            length = page * self.page_size - start
            if length >= num_tokens or page >= last:
                break
            if length >= min_chunk and self.view.pool.find(request.block_hashes[page], self.group.index) is not None:
                return length
        return num_tokens

    def scheduled(self, output: Any) -> None:
        """Report the pages that the requests of a step have adopted, in that step."""
        for request_id in [name for name in self.unreported if name in output.num_scheduled_tokens]:
            self.view.report_adopted(output, request_id, self.unreported.pop(request_id))


def make(scheduler: Any, config: StarlingConfig) -> BlockReuse | None:
    """Return the part of a scheduler, or None if it reuses no blocks."""
    add_core_utility(CACHED_TOKENS, cached_tokens)
    return BlockReuse.make(scheduler, config)


PARTS = (make,)
