"""View of a vLLM scheduler (requests, their pages and hits, queues, steps), and hooks in its steps.

All of this goes when vLLM has a scheduler API for plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import is_full_attention_spec
from vllm.v1.request import RequestStatus

from starling.vllm_compat.kv_pages import CacheGroup, Page, PagePool
from starling.vllm_compat.patching import extends, touches


@touches(
    "vllm.v1.core.sched.scheduler.Scheduler.{kv_cache_manager, kv_cache_config, hash_block_size, waiting, running}",
    "vllm.v1.core.sched.scheduler.Scheduler.{kv_holding_waiting, policy, pause_state, max_num_active_reqs}",
    "vllm.v1.core.sched.scheduler.Scheduler.{num_waiting_for_streaming_input, prefill_capacity_bound}",
    "vllm.v1.core.sched.scheduler.Scheduler.{num_spec_tokens, lora_config, need_mamba_block_aligned_split}",
    "vllm.v1.core.sched.scheduler.Scheduler.{_mamba_block_aligned_split, cache_config, max_num_scheduled_tokens}",
    "vllm.v1.core.sched.scheduler.Scheduler._inflight_prefill_reserved_blocks",
    "vllm.v1.core.sched.scheduler.Scheduler._request_remaining_blocks",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.{block_pool, coordinator, watermark_blocks, prefix_cache_stats}",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.{prefix_cache_lookup_enabled, evict_blocks, get_block_ids}",
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.single_type_managers",
    "vllm.v1.core.block_pool.BlockPool.emit_cached_block_events",
    "vllm.v1.request.Request.{prefill_stats, _all_token_ids}",
    "vllm.v1.metrics.stats.PrefillStats.num_local_cached_tokens",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.block_pool",
)
@touches("vllm.v1.core.sched.scheduler.Scheduler.use_v2_model_runner", before="0.34")
@touches(
    "vllm.v1.core.sched.scheduler.Scheduler.async_kv_waiting",
    "vllm.v1.request.Request.prefix_cache_hit_limit",
    since="0.34",
)
class SchedulerView:
    """One vLLM scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    @property
    def manager(self) -> Any:
        return self.scheduler.kv_cache_manager

    @cached_property
    def pool(self) -> PagePool:
        return PagePool(self.manager.block_pool)

    @cached_property
    def groups(self) -> list[CacheGroup]:
        groups, managers = self.scheduler.kv_cache_config.kv_cache_groups, self.manager.coordinator.single_type_managers
        return [
            CacheGroup(group.layer_names, group.kv_cache_spec, manager)
            for group, manager in zip(groups, managers, strict=True)
        ]

    @cached_property
    def only_group(self) -> CacheGroup | None:
        """Return the KV cache's group where it is one of full attention, hashed page by page; else None."""
        if len(self.groups) != 1 or type(self.groups[0].manager) is not FullAttentionManager:
            return None
        return self.groups[0] if self.groups[0].page_size == self.scheduler.hash_block_size else None

    @property
    def has_one_pool(self) -> bool:
        """Return whether the pages of all groups are of one pool, so that a number names one page."""
        return all(group.manager.block_pool is self.pool.block_pool for group in self.groups)

    @property
    def full_attention_page_size(self) -> int | None:
        """Return the tokens of a KV page of the full-attention layers, or None if there is no one size.

        The number that vLLM puts into cache_config.effective_attention_block_size, which is set only after the
        scheduler is made. Goes when it is set before.
        """
        sizes = {group.page_size for group in self.groups if is_full_attention_spec(group.manager.kv_cache_spec)}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def num_blocks(self) -> int:
        """Return the pool's pages, the null page included, as the KV cache configuration counts them."""
        return self.scheduler.kv_cache_config.num_blocks

    # The prefix cache.

    def may_hit(self, request: Any) -> bool:
        """Return whether a request may read any cached page of its prompt.

        Since vLLM 0.34, a request for the log-probabilities of its prompt may be bounded to the pages before the first
        one that is scored: it reads the prefix that vLLM finds, and nothing behind it.
        """
        bound = getattr(request, "prefix_cache_hit_limit", None)
        return bound is None and self.manager.prefix_cache_lookup_enabled(request)

    def evict(self, page_ids: set[int]) -> None:
        """Take pages out of the prefix cache; requests that hold them keep them."""
        self.manager.evict_blocks(page_ids)

    def is_at_page_border(self, group: CacheGroup, request: Any) -> bool:
        """Return whether a request holds exactly the pages of its computed tokens, all of them full and hashed."""
        num_pages = request.num_computed_tokens // group.page_size  # with a page begun it would hold one more
        held = len(group.pages(request.request_id))
        return held == group.num_hashed_pages(request.request_id) == num_pages

    def adopt(self, group: CacheGroup, request: Any, pages: Sequence[Page]) -> int:
        """Append cached pages to a request that is at a page border, as computed; returns their tokens."""
        held = group.manager.req_to_blocks[request.request_id]
        self.pool.hold(pages)
        held.extend(pages)
        group.manager.num_cached_block[request.request_id] = len(held)
        if self.pool.block_pool.enable_kv_cache_events and request.kv_cache_report_mode == "full":
            self.pool.block_pool.emit_cached_block_events(request, len(held), group.page_size, group.index)
        tokens = len(pages) * group.page_size
        request.num_computed_tokens += tokens
        return tokens

    def replace_pages(self, group: CacheGroup, request_id: str, page_ids: Collection[int]) -> bool:
        """Give a request other pages in place of these, without content; False: there are not enough free ones."""
        held = group.manager.req_to_blocks.get(request_id, [])
        indices = [index for index, page in enumerate(held) if page.block_id in page_ids]
        if len(indices) > self.pool.num_free_pages:
            return False
        replaced = [held[index] for index in indices]
        for index, page in zip(indices, self.pool.block_pool.get_new_blocks(len(indices)), strict=True):
            held[index] = page
        self.pool.release(replaced)
        return True

    def count_hit(self, request: Any, tokens: int, in_statistics: bool) -> None:
        """Count adopted tokens as vLLM counts a prefix hit: in the request's usage, once, and in the statistics.

        Args:
            in_statistics: True if the prefix cache's statistics count the request at all.
        """
        first_time = request.num_preemptions == 0
        if request.prefill_stats is not None and first_time:
            request.prefill_stats.num_cached_tokens += tokens
            request.prefill_stats.num_local_cached_tokens += tokens
            request.prefill_stats.num_computed_tokens -= tokens
        stats = self.manager.prefix_cache_stats
        if stats is not None and in_statistics:
            hits = "hits" if first_time else "preempted_hits"
            setattr(stats, hits, getattr(stats, hits) + tokens)

    def report_adopted(self, output: Any, request_id: str, page_ids: Sequence[int]) -> None:
        """Tell the worker, in a step about to go out, which pages a request has adopted since its last step.

        The V1 runner appends them to the request's pages, and takes its computed tokens, each time it is scheduled. V2
        keeps that number on the device: to it the request goes out as new, as a session that got more input does.
        """
        cached = output.scheduled_cached_reqs
        index = cached.req_ids.index(request_id)
        if not self.has_v2_runner:
            (fresh,) = cached.new_block_ids[index] or ([],)
            cached.new_block_ids[index] = ([*page_ids, *fresh],)
            return
        for column in (
            cached.req_ids,
            cached.new_block_ids,
            cached.num_computed_tokens,
            cached.num_output_tokens,
            cached.new_token_ids,
        ):
            if column:
                del column[index]
        request = self.scheduler.requests[request_id]
        all_page_ids = self.manager.get_block_ids(request_id)
        output.scheduled_new_reqs.append(NewRequestData.from_request(request, all_page_ids, request._all_token_ids))

    # Requests, and the steps that they share.

    @staticmethod
    def computed_tokens(request: Any) -> int:
        """Return the tokens whose step has come back; vLLM counts those in flight as computed."""
        return max(0, request.num_computed_tokens - request.num_in_flight_tokens)

    @staticmethod
    def cached_tokens(request: Any) -> int | None:
        """Return the prompt tokens found in the prefix cache.

        None after the first token, when vLLM has handed the number on.
        """
        stats = request.prefill_stats
        return None if stats is None else stats.num_cached_tokens

    def local_cached_tokens(self, request_id: str) -> int:
        """Return the prompt tokens that a just started request has found in this engine's own cache."""
        stats = self.scheduler.requests[request_id].prefill_stats
        return 0 if stats is None else stats.num_local_cached_tokens

    @property
    def by_priority(self) -> bool:
        """Return whether requests are scheduled by their priority."""
        return self.scheduler.policy == SchedulingPolicy.PRIORITY

    @property
    def admits_requests(self) -> bool:
        """Return whether waiting requests may be scheduled, as far as a pause and the number of active ones go."""
        return not self.pauses_new_requests and self.num_free_seats > 0

    @property
    def num_free_seats(self) -> int:
        """Return how many more requests may be active; those that run are, and sessions that wait for input."""
        scheduler = self.scheduler
        active = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        return scheduler.max_num_active_reqs - active

    def note_backlog(self) -> None:
        """Say that a step has left prompts waiting, as vLLM notes it of its queue, and then prefills in every step.

        Only with --prefill-schedule-interval does vLLM read this.
        """
        self.scheduler.prefill_capacity_bound = True

    @property
    def pauses_new_requests(self) -> bool:
        """Return whether waiting requests stay waiting, as in each kind of pause."""
        return self.scheduler.pause_state != PauseState.UNPAUSED

    @property
    def is_paused(self) -> bool:
        """Return whether nothing is scheduled, running requests included."""
        return self.scheduler.pause_state == PauseState.PAUSED_ALL

    @property
    def tokens_of_a_decode(self) -> int:
        """Return the tokens that a decoding request takes in a step, speculated ones included."""
        return 1 + self.scheduler.num_spec_tokens

    @property
    def tokens_of_a_decode_graph(self) -> int:
        """Return the tokens of a prompt's chunk that vLLM takes for a decode.

        A batch of such chunks may replay a full decode graph.

        Model runner V1 goes by the number alone (GPUModelRunner._is_uniform_decode). V2 takes a chunk of one token for
        a decode, and no other (GPUModelRunner.gather_batch_req_state).
        """
        return 1 if self.has_v2_runner else self.tokens_of_a_decode

    @property
    def has_v2_runner(self) -> bool:
        """Return whether workers run model runner V2, as all of them do since vLLM 0.34."""
        return getattr(self.scheduler, "use_v2_model_runner", True)

    @cached_property
    def has_decode_graphs(self) -> bool:
        """Return whether batches of decodes replay full CUDA graphs."""
        mode: Any = self.scheduler.vllm_config.compilation_config.cudagraph_mode
        return bool(mode.has_full_cudagraphs())

    @property
    def max_loras(self) -> int | None:
        """Return the number of LoRA adapters that a step has slots for, or None where LoRA is off."""
        config = self.scheduler.lora_config
        return None if config is None else config.max_loras

    @property
    def chunk_unit(self) -> int:
        """Return the tokens of which a chunk has to be a multiple: Mamba's blocks with mamba_cache_mode=align; else 1.

        With ``align``, the state that a chunk leaves behind is kept where the chunk ends, for prompts with that prefix.
        """
        return self.scheduler.cache_config.block_size if self.scheduler.need_mamba_block_aligned_split else 1

    def shorten_chunk(self, request: Any, start: int, tokens: int, limit: int) -> int:
        """Shorten a chunk that vLLM has made to about ``limit`` tokens, and to at least one unit.

        Args:
            start: the chunk's first position.
            tokens: the chunk's tokens.
        """
        if limit >= tokens or not limit or self.chunk_unit == 1:
            return min(tokens, limit)
        to_border = self.chunk_unit - start % self.chunk_unit
        most = self.scheduler.max_num_scheduled_tokens
        shortened = min(tokens, limit if self.chunk_unit > most else max(limit, to_border))
        return self.scheduler._mamba_block_aligned_split(request, shortened, start - request.num_computed_tokens)

    @property
    def nothing_runs(self) -> bool:
        """Return whether no request runs, and no waiting one holds pages, as one whose pages are being fetched does."""
        return not (self.scheduler.running or self.scheduler.kv_holding_waiting)

    def all_waiting(self) -> list[Any]:
        """Return the requests that wait, those that hold pages already first.

        Since vLLM 0.34, requests that a connector of the user's loads have a queue of their own.
        """
        loading = getattr(self.scheduler, "async_kv_waiting", ())
        return [*self.scheduler.kv_holding_waiting, *loading, *self.scheduler.waiting]

    def holds_pages_while_waiting(self, request: Any) -> bool:
        return request in self.scheduler.kv_holding_waiting

    @property
    def num_pages_for_waiting(self) -> int:
        """Free pages that waiting requests may take, without the watermark and what running prefills will need."""
        free = self.pool.num_free_pages - self.manager.watermark_blocks
        return free - self.scheduler._inflight_prefill_reserved_blocks()

    def num_pages_of(self, request: Any) -> int:
        """Return the pages that a waiting request will take, over all KV cache groups, a prefix hit's included."""
        return self.scheduler._request_remaining_blocks(request)

    @contextmanager
    def without_waiting(self, requests: Sequence[Any]) -> Iterator[None]:
        """Keep these requests out of the waiting queue for the duration of the block, while a step is scheduled.

        Then put each back where it was.

        To give such a request no tokens would not do: vLLM stops at the first waiting request that gets none.
        """
        if not requests:
            yield
            return
        queue = self.scheduler.waiting
        before = [] if self.by_priority else list(queue)
        queue.remove_requests(requests)
        try:
            yield
        finally:
            self._put_back(queue, requests, before)

    def _put_back(self, queue: Any, requests: Sequence[Any], before: Sequence[Any]) -> None:
        """Put each behind those that vLLM has put in front of the queue meanwhile, which it has preempted."""
        if self.by_priority:
            for request in requests:
                queue.add_request(request)
            return
        known = {id(request) for request in before}
        remaining = {id(request) for request in (*queue, *requests)}
        merged = [request for request in queue if id(request) not in known]
        merged += [request for request in before if id(request) in remaining]
        queue.clear()
        queue.extend(merged)


@touches("vllm.v1.core.sched.output.CachedRequestData.resumed_req_ids", before="0.34")
def started_ids(output: Any) -> set[str]:
    """Return the ids of the requests that a step starts, those that were preempted and start again included.

    Since vLLM 0.34 the latter go out as new, and CachedRequestData has no ``resumed_req_ids``.
    """
    new = {request.req_id for request in output.scheduled_new_reqs}
    return new | getattr(output.scheduled_cached_reqs, "resumed_req_ids", set())


def forget_uncomputed_pages(view: SchedulerView, request: Any) -> None:
    """Take the pages of a chunk that will not be computed out of the prefix cache, before their request is preempted.

    vLLM hashes a page when it is scheduled. By priority it may preempt a request that the same step has scheduled
    already, and would leave pages in the cache whose content never comes. Goes when vLLM drops those hashes itself.
    """
    for group in view.groups:
        uncomputed = group.pages(request.request_id)[request.num_computed_tokens // group.page_size :]
        hashed = {page.block_id for page in uncomputed if page.block_hash is not None}
        if hashed:
            view.evict(hashed)


@extends(Scheduler)
class SchedulerHooks:
    """Mixed into a vLLM scheduler class, before it. Calls the hooks of parts; CorePart in scheduler/part.py has them.

    Attributes:
        hooks: name of a hook -> those of the parts that have it.
    """

    hooks: Mapping[str, Sequence[Callable[..., Any]]]

    kv_cache_manager: Any
    block_size: int
    connector: Any
    lora_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.view = SchedulerView(self)
        self._adapters_of_step: set[int] = set()

    def schedule(self, throttle_prefills: bool = False) -> Any:
        self._adapters_of_step.clear()
        return super().schedule(throttle_prefills)  # type: ignore[misc]

    def _call(self, name: str, *args: Any) -> None:
        """Call the hooks of a name that return nothing."""
        for hook in self.hooks[name]:
            hook(*args)

    def _get_local_prefix_cache_hit(self, request: Any, *max_cache_hit_length: int | None) -> Any:
        hit = super()._get_local_prefix_cache_hit(request, *max_cache_hit_length)  # type: ignore[misc]
        if any(length is not None for length in max_cache_hit_length):  # vLLM 0.33: hidden states were kept up to here
            return hit
        blocks, num_tokens, boundary, *rest = hit
        if not blocks.blocks:  # a model without a KV cache
            return hit
        for hook in self.hooks["kept_boundary"]:
            boundary = hook(request, num_tokens, boundary)
        extended = (hook(request, blocks.blocks[0], num_tokens) for hook in self.hooks["extend_hit"])
        pages = next((pages for pages in extended if pages is not None), None)
        if pages is None:
            return blocks, num_tokens, boundary, *rest
        return self.kv_cache_manager.create_kv_cache_blocks((pages,)), len(pages) * self.block_size, boundary, *rest

    def _has_one_adapter_too_many(self, request: Any) -> bool:
        """Return whether a running request has to wait, since the step has ``max_loras`` other adapters already.

        vLLM 0.32 admits a waiting request by the adapters of the step alone. After a step in which a hook let a
        running request wait, more adapters can run than fit, which vLLM asserts never to occur. Goes with vLLM 0.32:
        0.33 counts the adapters of all running requests before it admits another.
        """
        adapter = request.lora_request.lora_int_id if self.lora_config and request.lora_request else 0
        if not adapter or adapter in self._adapters_of_step or request.status != RequestStatus.RUNNING:
            return False
        return len(self._adapters_of_step) >= self.lora_config.max_loras

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Call the hooks that bound the tokens of a request; vLLM calls this for every request it may schedule."""
        if self._has_one_adapter_too_many(request):
            return 0
        # Tokens with drafts, or with room for them, are not cut.
        is_chunk = num_computed_tokens + num_new_tokens <= request.num_tokens
        for hook in self.hooks["bound"] if is_chunk else ():
            num_new_tokens = hook(request, num_computed_tokens, num_new_tokens)
        num_new_tokens = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        refused = is_chunk and any(hook(request, num_computed_tokens, num_new_tokens) for hook in self.hooks["refuses"])
        if refused:
            return 0
        if num_new_tokens > 0 and self.lora_config and request.lora_request:
            self._adapters_of_step.add(request.lora_request.lora_int_id)
        return num_new_tokens

    def _build_kv_connector_meta(self, connector: Any, scheduler_output: Any) -> Any:
        self._call("scheduled", scheduler_output)
        return super()._build_kv_connector_meta(connector, scheduler_output)  # type: ignore[misc]

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        if self.connector is None:
            self._call("scheduled", scheduler_output)
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        forget_uncomputed_pages(self.view, request)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request_blocks(self, request: Any) -> None:
        self._call("pages_freed", request)
        super()._free_request_blocks(request)  # type: ignore[misc]
