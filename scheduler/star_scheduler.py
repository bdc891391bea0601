"""vLLM's scheduler, with prefix-cache keys that tell star pages from dense ones, and parts of prompts."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from engine_ext import compat
from engine_ext.metrics import cache_metrics
from scheduler.cache_keys import star_page_key
from scheduler.cache_state import cache_state, compressed_groups, states_used
from scheduler.core_utilities import add_core_utilities
from scheduler.options import OptionError, parse_options
from scheduler.plan import check_sizes, request_plan
from scheduler.share import part_of


def page_key(request: Any, start: int, end: int) -> tuple[str, str] | None:
    """The extra key of a request's page over positions ``[start, end)``."""
    plan = request_plan(request)
    return None if plan is None else star_page_key(plan, start, end)


class StarMixin:
    """Mixed into a vLLM scheduler: from its start on, pages are keyed by their star plan too.

    The keys go in where vLLM makes its own, so that hashing, KV events and partial hits agree.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        compat.add_page_key(page_key)
        compat.leave_out_of_hit_rate(lambda request: part_of(request) is not None)
        add_core_utilities()
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.decode_graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self.compressed = compressed_groups(self)
        if self.compressed:
            self._tell_sizes()
        self._check_defaults(vllm_config.additional_config["starling"].get("star", {}))

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

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        result = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        if self.compressed:
            used = (states_used(self, group.kv_cache_spec, manager) for group, manager in self.compressed)
            cache_metrics().states.set(sum(used))
        return result
    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        """A part of a prompt that other replicas prefill too goes on, after the anchor, at its first block.

        The pages in between are vLLM's null page, which takes no memory and is never hashed: no other request can
        find it, and star rows never read it. The part's own blocks have the keys of the whole prompt, and may be
        cached. Where the anchor is not, everything is computed.
        """
        hit = super()._get_local_prefix_cache_hit(request)  # type: ignore[misc]
        part = part_of(request)
        if part is None:
            return hit
        blocks, computed, boundary, diverged = hit
        if not part.anchor <= computed < part.start:
            return hit
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        page, pool = self.block_size, manager.block_pool  # type: ignore[attr-defined]
        pages = list(blocks.blocks[0])
        pages += [pool.null_block] * (part.start // page - len(pages))
        # vLLM, too, leaves the last prompt token to be computed.
        for block_hash in request.block_hashes[len(pages) : (request.num_tokens - 1) // page]:
            found = pool.get_cached_block(block_hash, [0])
            if found is None:
                break
            pages += found
        return manager.create_kv_cache_blocks((pages,)), len(pages) * page, boundary, diverged

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Where full decode graphs are in use, never schedule a star chunk of one token: it waits a step.

        A batch of one-token rows replays such a graph, whose block tables can't be rewritten into virtual rows.
        """
        num_new_tokens = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        if num_new_tokens == 1 and self.decode_graphs:
            plan = request_plan(request)
            if plan is not None and plan.block_size <= num_computed_tokens < plan.context_end:
                return 0
        return num_new_tokens


class StarScheduler(StarMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class AsyncStarScheduler(StarMixin, AsyncScheduler):
    """For engines with async scheduling: vLLM turns it off for a class that is not an AsyncScheduler."""
