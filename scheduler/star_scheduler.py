"""vLLM's scheduler: keys, hits and chunks that know star plans, steps that prompts share, parts of prompts."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from engine_ext import compat
from engine_ext.metrics import cache_metrics, scheduler_metrics
from engine_ext.shard_client import LostRequests
from scheduler.block_reuse import BlockReuse, only_manager, reuse_obstacle
from scheduler.cache_keys import independent_block_hasher, star_page_key
from scheduler.cache_state import cache_state, compressed_groups, states_used
from scheduler.core_utilities import add_core_utilities
from scheduler.fairness import make_limits
from scheduler.options import OptionError, parse_options
from scheduler.plan import check_sizes, request_plan
from scheduler.prompt_sharing import PromptSharing, sharing_obstacle
from scheduler.scheduling_options import LEAST_CHUNK, SECTION, SchedulingOptions, parse_scheduling
from scheduler.share import LOST, attend_of, default_shards, part_of

logger = init_logger("vllm.starling")


def page_key(request: Any, start: int, end: int) -> tuple[str, str] | None:
    """The extra key of a request's page over positions ``[start, end)``."""
    plan = request_plan(request)
    return None if plan is None else star_page_key(plan, start, end)


class StarMixin:
    """Mixed into a vLLM scheduler: from its start on, pages are keyed by their star plan too.

    The keys go in where vLLM makes its own, so that hashing, KV events and partial hits agree.
    """

    # vLLM's own.
    requests: dict[str, Any]
    kv_cache_manager: Any
    max_num_scheduled_tokens: int
    pause_state: PauseState

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        compat.add_page_key(page_key)
        compat.leave_out_of_hit_rate(lambda request: part_of(request) is not None or attend_of(request) is not None)
        add_core_utilities()
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.decode_graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        entry = vllm_config.additional_config["starling"]
        self._check_defaults(entry.get("star", {}))
        options = parse_scheduling(entry.get(SECTION, {}))
        self.sharing = self._make_sharing(options) if options.fairness == "on" else None
        self.reuse = self._make_reuse(vllm_config) if options.star_block_reuse == "on" else None
        compat.use_request_hasher(independent_block_hasher if self.reuse else None)
        self.shared_out = default_shards(vllm_config) > 1
        self.metrics = scheduler_metrics()
        self.compressed = compressed_groups(self)
        if self.compressed:
            self._tell_sizes()

    def _make_sharing(self, options: SchedulingOptions) -> PromptSharing | None:
        obstacle = sharing_obstacle(self)
        if obstacle is not None:
            logger.warning("Long prompts are not held back for others here: %s", obstacle)
            return None
        return PromptSharing(self, make_limits(options, self.max_num_scheduled_tokens))

    def _make_reuse(self, vllm_config: Any) -> BlockReuse | None:
        manager = only_manager(self)
        obstacle = reuse_obstacle(vllm_config) or (None if manager else "the KV cache has several groups of layers")
        if obstacle is not None or manager is None:
            logger.info("Star blocks are found in the prefix cache from a prompt's start only: %s", obstacle)
            return None
        return BlockReuse(self, manager)

    def _check_defaults(self, star: dict[str, Any]) -> None:
        """Server defaults against the page that the engine really has (raises ValueError: it does not start)."""
        options = parse_options(star, flat=False)
        page = compat.scheduler_page(self)
        if options.mode == "off":
            return
        if page is None:
            raise OptionError("star", options.mode, "the full-attention layers have no one KV page size", "off")
        check_sizes(options, page)

    def _tell_sizes(self) -> None:
        """The sizes of a compressed cache on /metrics."""
        metrics = cache_metrics()
        state = cache_state(self, per_request=False)
        for index, group in enumerate(state["groups"]):
            metrics.bytes_per_token.labels(str(index), group["kind"]).set(group.get("bytes_per_token", 0))
        for cache, field in (("compressed", "capacity_tokens"), ("uncompressed", "uncompressed_capacity_tokens")):
            metrics.capacity.labels(cache).set(state.get(field, 0))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        lost = self._end_lost(model_runner_output)
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for request, reason in lost:
            outputs = result.setdefault(request.client_index, EngineCoreOutputs())
            outputs.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    kv_transfer_params={LOST: reason},
                )
            )
        if self.compressed:
            used = (states_used(self, group.kv_cache_spec, manager) for group, manager in self.compressed)
            cache_metrics().states.set(sum(used))
        return result

    def _end_lost(self, model_runner_output: Any) -> list[tuple[Any, str]]:
        """End the requests of a step that could not attend to all their keys, before its tokens are looked at.

        What they have computed over the shards leaves the prefix cache, and so does who shares such a page: vLLM keys
        a page when it is scheduled, and finds it within the same step.
        """
        told = model_runner_output.kv_connector_output
        meta = told.kv_connector_worker_meta if told is not None else None
        if not isinstance(meta, LostRequests):
            return []
        bad: set[int] = set()
        for name in meta.reasons:
            attend = attend_of(self.requests[name]) if name in self.requests else None
            if attend is not None:
                bad |= set(self._pages(name)[attend.span()[1] // self.block_size :])  # type: ignore[attr-defined]
        reasons = dict(meta.reasons)
        for name in self.requests:
            if name not in reasons and bad.intersection(self._pages(name)):
                reasons[name] = "it shares pages with a request that could not attend to all its keys"
        self.kv_cache_manager.evict_blocks(bad)
        ended = self.finish_requests(reasons, RequestStatus.FINISHED_ERROR)  # type: ignore[attr-defined]
        return [(request, reasons[request.request_id]) for request in ended]

    def _pages(self, request_id: str) -> list[int]:
        manager = self.kv_cache_manager.coordinator.single_type_managers[0]
        return [page.block_id for page in manager.req_to_blocks.get(request_id, ())]

    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        """A part of a prompt that other replicas prefill too goes on, after the anchor, at its first block.

        The pages in between are vLLM's null page, which takes no memory and is never hashed: no other request can
        find it, and star rows never read it. The part's own blocks have the keys of the whole prompt, and may be
        cached. Where the anchor is not, everything is computed.

        So has a prompt that leaves its KV with other replicas, for what they hold; its own start is held here.
        """
        hit = super()._get_local_prefix_cache_hit(request)  # type: ignore[misc]
        part, attend = part_of(request), attend_of(request)
        blocks, computed, boundary, diverged = hit
        page = self.block_size  # type: ignore[attr-defined]
        if attend is not None:
            pages, goes_on = list(self.connector.held[attend.own]), attend.span()[1]  # type: ignore[attr-defined]
        elif part is not None and part.anchor <= computed < part.start:
            pages, goes_on = list(blocks.blocks[0]), part.start
        else:
            return hit
        manager = self.kv_cache_manager
        pool = manager.block_pool
        pages += [pool.null_block] * (goes_on // page - len(pages))
        # vLLM, too, leaves the last prompt token to be computed.
        for block_hash in request.block_hashes[len(pages) : (request.num_tokens - 1) // page]:
            found = pool.get_cached_block(block_hash, [0])
            if found is None:
                break
            pages += found
        return manager.create_kv_cache_blocks((pages,)), len(pages) * page, boundary, diverged

    def add_request(self, request: Any) -> None:
        if self.shared_out and request.max_tokens:
            request.max_tokens = min(request.max_tokens, self._output_room(request))
        super().add_request(request)  # type: ignore[misc]
        is_new = self.requests.get(request.request_id) is request  # or more input of a session
        attend = attend_of(request)
        if is_new and attend is not None:
            self.connector.begin_attend(attend.own)  # type: ignore[attr-defined]
        if is_new and self.reuse is not None:
            self.reuse.add(request)
        if is_new and self.sharing is not None and self.sharing.takes(request):
            self.sharing.add(request, self._tokens_in_cache(request))

    def _output_room(self, request: Any) -> int:
        """Tokens that a request can generate until it alone fills the memory: then it ends by its length.

        Elsewhere vLLM has made sure that a request of max_model_len fits.
        """
        attend = attend_of(request)
        first, stop = (0, 0) if attend is None else attend.span()
        room = (self.kv_cache_manager.block_pool.num_gpu_blocks - 1) * self.block_size  # type: ignore[attr-defined]
        return max(room - (request.num_prompt_tokens - (stop - first)), 1)

    def _tokens_in_cache(self, request: Any) -> int:
        """Prompt tokens that need no computing as the cache stands; 0 where that is not simply told."""
        manager = only_manager(self)
        if manager is None or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return 0
        attend = attend_of(request)
        if attend is not None:
            return attend.span()[1]
        pool, group = manager.block_pool, [manager.kv_cache_group_id]
        hits = (pool.get_cached_block(key, group) is not None for key in request.block_hashes)
        anywhere = self.reuse is not None and request.request_id in self.reuse.requests
        return sum(hits if anywhere else takewhile(bool, hits)) * manager.block_size

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if self.reuse is not None and self.reuse.requests and self.pause_state != PauseState.PAUSED_ALL:
            self.metrics.count_hit("block", self.reuse.adopt_all())
        if self.sharing is None or not self.sharing.prompts:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        with self.sharing.step():
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.metrics.deferred_tokens.inc(self.sharing.deferred)
        return output

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Bound a chunk: by what its prompt may take of this step, and at star blocks that are in the cache.

        Where full decode graphs are in use, never schedule a star chunk of one token: it waits a step. A batch of
        one-token rows replays such a graph, whose block tables can't be rewritten into virtual rows.
        """
        if self.sharing is not None:
            num_new_tokens = self.sharing.bound(request, num_new_tokens)
        if self.reuse is not None:
            least = LEAST_CHUNK if self.decode_graphs else 1
            num_new_tokens = self.reuse.clip(request, num_computed_tokens, num_new_tokens, least)
        num_new_tokens = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        if num_new_tokens == 1 and self.decode_graphs:
            plan = request_plan(request)
            if plan is not None and plan.block_size <= num_computed_tokens < plan.context_end:
                return 0
        return num_new_tokens

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            if not request.num_preemptions and part_of(request) is None and attend_of(request) is None:
                self.metrics.count_hit("prefix", new.num_computed_tokens)
        if self.reuse is not None:
            self.reuse.tell_worker(scheduler_output)
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Before its pages go back: those of a chunk that this step will no longer compute leave the prefix cache.

        vLLM keys a page when it is scheduled. By priority it may preempt a request that the same step has scheduled
        already, and would leave pages in the cache whose content never comes. Goes when vLLM drops those keys itself.
        """
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, FullAttentionManager):
                held = manager.req_to_blocks.get(request.request_id, ())
                empty = held[request.num_computed_tokens // manager.block_size :]
                keyed = {page.block_id for page in empty if page.block_hash is not None}
                if keyed:
                    self.kv_cache_manager.evict_blocks(keyed)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request_blocks(self, request: Any) -> None:
        if self.reuse is not None:
            self.reuse.forget_pages(request.request_id)
        super()._free_request_blocks(request)  # type: ignore[misc]


class StarScheduler(StarMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class AsyncStarScheduler(StarMixin, AsyncScheduler):
    """For engines with async scheduling: vLLM turns it off for a class that is not an AsyncScheduler."""
