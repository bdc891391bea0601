"""vLLM's scheduler with hooks at the points where Starling has a say.

The overridden methods are not part of SchedulerInterface. Each goes when vLLM has a hook of its own at that point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from starling.vllm_compat.kv_pages import Page
from starling.vllm_compat.patching import extends
from starling.vllm_compat.scheduler_view import SchedulerView, forget_uncomputed_pages


@extends(Scheduler)
class SchedulerHooks:
    """Mixed into a vLLM scheduler class, before it. Subclasses override the hooks, which change nothing here."""

    kv_cache_manager: Any
    block_size: int
    connector: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.view = SchedulerView(self)

    # The hooks.

    def extend_prefix_hit(self, request: Any, pages: Sequence[Page], num_tokens: int) -> list[Page] | None:
        """Replace the pages found for a request's start; None leaves the hit as it is.

        Args:
            pages: of the first KV cache group; ``num_tokens`` are those in them.
        """
        return None

    def kept_boundary(self, request: Any, num_tokens: int, found: int) -> int:
        """Where, besides at its end, the state or window of a prompt stays in the prefix cache: a page border.

        Args:
            num_tokens: those found in the prefix cache.
            found: where another request's prompt has turned out to differ, or 0.
        """
        return found

    def bound_chunk(self, request: Any, start: int, num_tokens: int) -> int:
        """How many of the tokens from position ``start`` on a request may have in this step."""
        return num_tokens

    def refuse_chunk(self, request: Any, start: int, num_tokens: int) -> bool:
        """Whether a chunk of this length, the final one, can't run in this step and has to wait."""
        return False

    def after_schedule(self, output: Any) -> None:
        """A step is about to go to the KV connector and to the workers; computed tokens are still those before it."""

    def before_pages_freed(self, request: Any) -> None:
        """A request's pages are about to be freed."""

    # vLLM's methods.

    def _get_local_prefix_cache_hit(self, request: Any, *max_cache_hit_length: int | None) -> Any:
        hit = super()._get_local_prefix_cache_hit(request, *max_cache_hit_length)  # type: ignore[misc]
        if any(length is not None for length in max_cache_hit_length):  # vLLM 0.33: hidden states were kept up to here
            return hit
        blocks, num_tokens, boundary, *rest = hit
        if not blocks.blocks:  # a model without a KV cache
            return hit
        boundary = self.kept_boundary(request, num_tokens, boundary)
        pages = self.extend_prefix_hit(request, blocks.blocks[0], num_tokens)
        if pages is None:
            return blocks, num_tokens, boundary, *rest
        return self.kv_cache_manager.create_kv_cache_blocks((pages,)), len(pages) * self.block_size, boundary, *rest

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Called for every request that vLLM is about to schedule."""
        # Tokens with drafts, or with room for them, are not cut.
        is_chunk = num_computed_tokens + num_new_tokens <= request.num_tokens
        if is_chunk:
            num_new_tokens = self.bound_chunk(request, num_computed_tokens, num_new_tokens)
        num_new_tokens = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        refused = is_chunk and self.refuse_chunk(request, num_computed_tokens, num_new_tokens)
        return 0 if refused else num_new_tokens

    def _build_kv_connector_meta(self, connector: Any, scheduler_output: Any) -> Any:
        self.after_schedule(scheduler_output)
        return super()._build_kv_connector_meta(connector, scheduler_output)  # type: ignore[misc]

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        if self.connector is None:
            self.after_schedule(scheduler_output)
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        forget_uncomputed_pages(self.view, request)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request_blocks(self, request: Any) -> None:
        self.before_pages_freed(request)
        super()._free_request_blocks(request)  # type: ignore[misc]
