"""Star blocks found in the prefix cache behind a hole: adopted while the request prefills.

vLLM looks a prompt up once, when it is admitted, and from its start: the first page that is missing ends the hit.
Under star every other block's KV is still exactly right, so a running request looks again between steps: where its
next page is cached it takes the run of cached pages as its own and goes on behind it. Its chunks end at blocks that
are cached, so that it comes to stand there.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import RequestStatus

from scheduler.cache_keys import independent_plan, restarts
from scheduler.independence import dependence
from scheduler.share import CONNECTOR, part_of


def reuse_obstacle(vllm_config: Any) -> str | None:
    """Why star blocks can't be adopted behind a hole, as far as the configuration tells; None: they can."""
    if not vllm_config.cache_config.enable_prefix_caching:
        return "prefix caching is off"
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector != CONNECTOR:
        return "a KV connector follows a request's pages from its start"
    if vllm_config.aux_output_config.enabled:
        return "routed experts are returned for tokens in the order in which they are computed"
    return dependence(vllm_config.model_config)


def only_manager(scheduler: Any) -> FullAttentionManager | None:
    """The manager of the KV cache where it is one group of full attention, keyed page by page; else None."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    if len(managers) != 1 or type(managers[0]) is not FullAttentionManager:
        return None
    return managers[0] if managers[0].block_size == scheduler.hash_block_size else None


class BlockReuse:
    """Adopts cached pages for the star requests of one scheduler.

    Between the adoption and the step that tells the worker, the pages taken are noted here.
    """

    def __init__(self, scheduler: Any, manager: FullAttentionManager) -> None:
        self.scheduler = scheduler
        self.manager = manager
        self.pool = scheduler.kv_cache_manager.block_pool
        self.page = manager.block_size
        self.requests: dict[str, Any] = {}
        self.untold: dict[str, list[int]] = {}

    def add(self, request: Any) -> None:
        """Look after a request from now on, where it has independent star blocks and may read the cache."""
        if independent_plan(request) is not None and not request.skip_reading_prefix_cache:
            self.requests[request.request_id] = request

    def forget_pages(self, request_id: str) -> None:
        """Its pages have been freed."""
        self.untold.pop(request_id, None)

    def adopt_all(self) -> int:
        """Adopt what can be adopted, before a step is scheduled; returns the tokens that need no computing.

        Before, so that no page is taken whose content the step to come would have to compute first.
        """
        adopted = 0
        for request_id, request in list(self.requests.items()):
            if request.is_finished():
                del self.requests[request_id]
            elif request.status == RequestStatus.RUNNING:
                adopted += self._adopt(request)
        return adopted

    def _adopt(self, request: Any) -> int:
        name = request.request_id
        first = request.num_computed_tokens // self.page
        last = (request.num_tokens - 1) // self.page  # a token must be left to compute
        if first >= last:
            return 0
        held = self.manager.req_to_blocks[name]
        # It must stand at the border of a page: with one begun it would hold one more.
        if not len(held) == self.manager.num_cached_block.get(name) == first:
            return 0
        found = []
        for key in islice(request.block_hashes, first, last):
            hit = self._cached(key)
            if hit is None:
                break
            found.append(hit)
        if not found:
            return 0
        self.pool.touch(found)
        held.extend(found)
        self.manager.num_cached_block[name] = len(held)
        if self.pool.enable_kv_cache_events and request.kv_cache_report_mode == "full":
            self.pool.emit_cached_block_events(request, len(held), self.page, self.manager.kv_cache_group_id)
        self.untold.setdefault(name, []).extend(page.block_id for page in found)
        tokens = len(found) * self.page
        request.num_computed_tokens += tokens
        self._count(request, tokens)
        return tokens

    def _cached(self, key: Any) -> Any | None:
        hit = self.pool.get_cached_block(key, [self.manager.kv_cache_group_id])
        return None if hit is None else hit[0]

    def _count(self, request: Any, tokens: int) -> None:
        """As vLLM counts a prefix hit: in the request's usage, once, and in the prefix cache's statistics.

        Of a part that replicas prefill for one of them, these know nothing.
        """
        first_time = request.num_preemptions == 0
        if request.prefill_stats is not None and first_time:
            request.prefill_stats.num_cached_tokens += tokens
            request.prefill_stats.num_local_cached_tokens += tokens
            request.prefill_stats.num_computed_tokens -= tokens
        stats = self.scheduler.kv_cache_manager.prefix_cache_stats
        if stats is not None and part_of(request) is None:
            hits = "hits" if first_time else "preempted_hits"
            setattr(stats, hits, getattr(stats, hits) + tokens)

    def clip(self, request: Any, start: int, tokens: int, least: int) -> int:
        """End a chunk at the next block whose first page is cached, or the cached query, for it to be adopted there.

        Args:
            least: a chunk is not cut below so many tokens.
        """
        if tokens <= least or request.request_id not in self.requests:
            return tokens
        plan = independent_plan(request)
        if plan is None or start >= plan.context_end:
            return tokens
        last = (request.num_tokens - 1) // self.page
        for number in restarts(plan, self.page):
            length = number * self.page - start
            if length >= tokens or number >= last:
                break
            if length >= least and self._cached(request.block_hashes[number]) is not None:
                return length
        return tokens

    def tell_worker(self, output: Any) -> None:
        """Say in a step about to go out which pages its requests have adopted.

        V1 appends them to the request's pages, and takes its place in the prompt, each time it is scheduled. V2 keeps
        that place on the device: to it the request goes out as new, as a session that got more input does.
        """
        if not self.untold:
            return
        cached = output.scheduled_cached_reqs
        for name in [name for name in self.untold if name in output.num_scheduled_tokens]:
            pages = self.untold.pop(name)
            index = cached.req_ids.index(name)
            if self.scheduler.use_v2_model_runner:
                self._send_as_new(output, index)
            else:
                (fresh,) = cached.new_block_ids[index] or ([],)
                cached.new_block_ids[index] = ([*pages, *fresh],)

    def _send_as_new(self, output: Any, index: int) -> None:
        cached = output.scheduled_cached_reqs
        name = cached.req_ids[index]
        for column in (
            cached.req_ids,
            cached.new_block_ids,
            cached.num_computed_tokens,
            cached.num_output_tokens,
            cached.new_token_ids,
        ):
            if column:
                del column[index]
        request = self.scheduler.requests[name]
        pages = self.scheduler.kv_cache_manager.get_block_ids(name)
        output.scheduled_new_reqs.append(NewRequestData.from_request(request, pages, request._all_token_ids))
