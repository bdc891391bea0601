"""Chunks of prompts with a star plan: where vLLM keeps a state, and how a chunk is no decode."""

from __future__ import annotations

from typing import Any

from starling.config.entry import StarlingConfig
from starling.scheduler.part import CorePart
from starling.scheduler.star.request_metadata import metadata_of
from starling.vllm_compat.scheduler_view import SchedulerView


class PlanChunks(CorePart):
    """Of one scheduler."""

    def __init__(self, view: SchedulerView, page_size: int) -> None:
        self.view = view
        self.page_size = page_size

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> PlanChunks:
        return cls(scheduler.view, scheduler.block_size)

    def kept_boundary(self, request: Any, num_tokens: int, found: int) -> int:
        """The end of the context, where the next turn of a chat goes on, or the border that vLLM has found.

        Behind the context, the keys of pages contain its end. vLLM keeps a state or window at the last page of a
        prompt, where only the same prompt finds it. A border that vLLM has found comes first where nothing was hit:
        other prompts begin alike. Else it is where the last turn ended, and each turn would keep the end of the one
        before.
        """
        plan = metadata_of(request).plan
        if plan is None or (found and not num_tokens):
            return found
        return plan.context_end // self.page_size * self.page_size

    def bound(self, request: Any, start: int, num_tokens: int) -> int:
        """A chunk of two tokens or more that would replay a decode graph is made one token shorter."""
        return num_tokens - 1 if num_tokens > 1 and self._replays_a_graph(request, start, num_tokens) else num_tokens

    def refuses(self, request: Any, start: int, num_tokens: int) -> bool:
        """A chunk of one token waits a step where it would replay a decode graph."""
        return self._replays_a_graph(request, start, num_tokens)

    def _replays_a_graph(self, request: Any, start: int, num_tokens: int) -> bool:
        """Whether a batch of such chunks replays a full decode graph, whose block tables are not those of star rows."""
        if not self.view.has_decode_graphs or num_tokens != self.view.tokens_of_a_decode_graph:
            return False
        plan = metadata_of(request).plan
        return plan is not None and start < plan.context_end and start + num_tokens > plan.head_end


PARTS = (PlanChunks.make,)
