"""vLLM's scheduler with Starling's parts: page keys by star plans, and what each feature does in the engine core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from starling.config.entry import StarlingConfig, config_of
from starling.config.star import StarOptions
from starling.scheduler.cache_keys import page_keys
from starling.scheduler.cache_state import CompressedCache, add_core_rpc
from starling.scheduler.padding import BlockPadding
from starling.scheduler.part import CorePart, HasParts, hooks_of
from starling.scheduler.planning.request_metadata import metadata_of
from starling.scheduler.planning.rules import check_sizes
from starling.scheduler.provenance import Provenance
from starling.vllm_compat.patching import extends
from starling.vllm_compat.prefix_cache import add_page_keys, hash_prompts_in_core
from starling.vllm_compat.scheduler_view import SchedulerHooks, SchedulerView


class PlanChunks(CorePart):
    """Chunks of prompts with a plan, as one scheduler may run them."""

    def __init__(self, view: SchedulerView, page_size: int) -> None:
        self.view = view
        self.page_size = page_size

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> PlanChunks:
        return cls(scheduler.view, scheduler.block_size)

    def kept_boundary(self, request: Any, num_tokens: int, found: int) -> int:
        """Return the end of the context, where the next turn of a chat goes on, or the border that vLLM has found.

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
        """Cut a token off a chunk of two tokens or more that would replay a decode graph."""
        return num_tokens - 1 if num_tokens > 1 and self._replays_a_graph(request, start, num_tokens) else num_tokens

    def refuses(self, request: Any, start: int, num_tokens: int) -> bool:
        """Let a chunk of one token wait a step if it would replay a decode graph."""
        return self._replays_a_graph(request, start, num_tokens)

    def _replays_a_graph(self, request: Any, start: int, num_tokens: int) -> bool:
        """Return whether such chunks replay a full decode graph, whose block tables are not those of star rows."""
        if not self.view.has_decode_graphs or num_tokens != self.view.tokens_of_a_decode_graph:
            return False
        plan = metadata_of(request).plan
        return plan is not None and start < plan.context_end and start + num_tokens > plan.head_end


@extends(Scheduler)
class StarMixin(HasParts, SchedulerHooks):
    """Mixed into a vLLM scheduler class, before it: calls the hooks of its parts (part.py), and knows none of them.

    The page keys go in where vLLM makes its own, so that hashing, KV events and partial hits agree.
    """

    feature_parts: Sequence[Callable[[Any, StarlingConfig], CorePart | None]] = ()
    """Makers of the parts (engine_ext/engine_core.py)."""

    requests: dict[str, Any]  # vLLM's own

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        add_page_keys(page_keys)
        hash_prompts_in_core(lambda request: metadata_of(request).plan is not None)
        add_core_rpc()
        super().__init__(vllm_config, *args, **kwargs)
        config = config_of(vllm_config) or StarlingConfig()
        self._check_defaults(config.star)
        self.parts: list[CorePart] = []
        # PlanChunks comes behind all others that bound a chunk.
        for make in (BlockPadding.make, Provenance.make, *self.feature_parts, PlanChunks.make, CompressedCache.make):
            part = make(self, config)
            if part is not None:
                self.parts.append(part)
        self.use_parts(self.parts)

    def _check_defaults(self, options: StarOptions) -> None:
        """Hold the server's star options against the page that the engine really has (raises OptionError)."""
        page_size = self.view.full_attention_page_size
        if options.mode == "on" or (options.mode == "auto" and page_size is not None):
            check_sizes(options, page_size)

    def use_parts(self, parts: Iterable[CorePart]) -> None:
        """Call these parts from now on, in this order."""
        self.parts = list(parts)
        self.hooks = hooks_of(self.parts)

    # What vLLM calls.

    def add_request(self, request: Any) -> None:
        self._call("arriving", request)
        super().add_request(request)  # type: ignore[misc]
        if self.requests.get(request.request_id) is request:  # else more input of a session
            self._call("added", request)

    def schedule(self, throttle_prefills: bool = False) -> Any:
        self._call("before_step")
        around = next((found for hook in self.hooks["around_step"] if (found := hook()) is not None), nullcontext())
        with around:
            return super().schedule(throttle_prefills)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._call("before_outputs", model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        self._call("outputs", outputs)
        return outputs
