"""vLLM's scheduler with hooks at the points where Starling has a say.

The overridden methods are not part of SchedulerInterface. Each goes when vLLM has a hook of its own at that point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from starling.vllm_compat.patching import extends
from starling.vllm_compat.scheduler_view import SchedulerView, forget_uncomputed_pages


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
