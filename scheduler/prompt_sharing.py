"""The state behind scheduler/fairness.py: which prompts of a scheduler are long, and what each may take of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from scheduler.fairness import Limits, LongPrompt, share_step
from scheduler.plan import request_plan
from scheduler.scheduling_options import LEAST_CHUNK

WAITING = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def sharing_obstacle(scheduler: Any) -> str | None:
    """Why a scheduler's chunks can't be bounded; None: they can."""
    if not scheduler.scheduler_config.enable_chunked_prefill:
        return "chunked prefill is off, so a prompt is prefilled in one step"
    if scheduler.need_mamba_block_aligned_split:
        return "with mamba_cache_mode=align a chunk must end where Mamba's state is kept"
    return None


def adapter_of(request: Any) -> int:
    """The number of a request's LoRA adapter; 0: none."""
    return request.lora_request.lora_int_id if request.lora_request else 0


class PromptSharing:
    """Shares each step of one scheduler among its prompts.

    Costs nothing while every live prompt fits in one step.
    """

    def __init__(self, scheduler: Any, limits: Limits) -> None:
        self.scheduler = scheduler
        self.limits = limits
        self.prompts: dict[str, Any] = {}
        self.found: dict[str, int] = {}
        self.granted: dict[str, int] | None = None  # while a step is scheduled, and there are long prompts
        self.deferred = 0
        self.yielded = False  # a step to short prompts, and none since in which a long one had its part
        self.without_adapter: set[str] = set()

    def takes(self, request: Any) -> bool:
        """Whether a request that just arrived may be a long prompt; images that must not be cut keep it out."""
        whole = request.mm_features and self.scheduler.scheduler_config.disable_chunked_mm_input
        return request.num_prompt_tokens > self.limits.long_prompt and not whole

    def add(self, request: Any, cached_tokens: int) -> None:
        """Know a prompt that is larger than a long one; ``cached_tokens`` of it are in the cache as it arrives.

        Whether it counts as long is settled by that, to its end: its last chunks are as deep as those before.
        """
        self.prompts[request.request_id] = request
        self.found[request.request_id] = cached_tokens

    @contextmanager
    def step(self) -> Iterator[None]:
        """While a step is scheduled: long prompts are bounded, and waiting ones whose turn it is not are out of sight.

        Bounding such a one to nothing would not do: vLLM stops at a waiting request that gets no tokens.
        """
        self.granted, self.deferred = self._grant(), 0
        hidden = self._not_admitted()
        queue = self.scheduler.waiting
        before = list(queue) if hidden else []
        if hidden:
            queue.remove_requests(hidden)
        try:
            yield
        finally:
            self.granted = None
            if hidden:
                self._put_back(hidden, before)

    def bound(self, request: Any, tokens: int) -> int:
        """The part of a chunk that a request may have in this step."""
        if self.granted is None:
            return tokens
        prefills = request.status == RequestStatus.RUNNING and self._is_long(request)
        most = self.granted.get(request.request_id, 0 if prefills else tokens)
        if not most and self.without_adapter and adapter_of(request):
            most = LEAST_CHUNK  # vLLM counts the adapters of a step: out of it, this one's place would go to another
        self.deferred += max(0, tokens - most)
        if most and request.request_id in self.granted:
            self.yielded = False
        return min(tokens, most)

    def _left(self, request: Any) -> int:
        """Tokens to prefill: an estimate for a request that waits."""
        if request.status in WAITING:
            return max(1, request.num_tokens - self.found.get(request.request_id, 0))
        return request.num_tokens - request.num_computed_tokens

    def _is_long(self, request: Any) -> bool:
        """Whether it is a long prompt that is not done; one that decodes is not."""
        found = self.found.get(request.request_id)
        long = found is not None and request.num_prompt_tokens - found > self.limits.long_prompt
        return long and self._left(request) > 1

    def _long_now(self) -> list[Any]:
        """The long prompts, most urgent first."""
        for name in [name for name, request in self.prompts.items() if request.is_finished()]:
            del self.prompts[name], self.found[name]
        live = (r for r in self.prompts.values() if r.status == RequestStatus.RUNNING or r.status in WAITING)
        found = [request for request in live if self._is_long(request)]
        if self._by_priority:
            found.sort(key=lambda request: (request.priority, request.arrival_time))
        return found

    @property
    def _by_priority(self) -> bool:
        return self.scheduler.policy == SchedulingPolicy.PRIORITY

    def _grant(self) -> dict[str, int] | None:
        """Tokens that each long prompt may have in a step, those that are not named none; None: there are none."""
        requests = self._with_room(self._long_now())
        if not requests:
            return None
        self.without_adapter = self._without_adapter()
        prompts = [
            LongPrompt(
                name=request.request_id,
                start=request.num_tokens - self._left(request),
                left=self._left(request),
                runs=request.status == RequestStatus.RUNNING,
                plan=request_plan(request),
                priority=request.priority if self._by_priority else 0,
            )
            for request in requests
        ]
        decodes, short = self._wanted_by_others(prompts[0].priority)
        if short and prompts[0].runs and not self.yielded:
            self.yielded = True
            return {}
        return share_step(prompts, decodes + short, self.limits)

    def _with_room(self, requests: list[Any]) -> list[Any]:
        """Those that run, and those waiting that there is room for beside the ones before them.

        One taken in without room would only be preempted. None goes past an earlier one that lacks it, and where no
        long prompt runs whether the first fits is vLLM's to say: so it comes in once the others have ended.
        """
        room, scheduler = self._room(), self.scheduler
        any_runs = any(request.status == RequestStatus.RUNNING for request in requests)
        full = len(scheduler.running) >= scheduler.max_num_running_reqs
        fit: list[Any] = []
        for request in requests:
            if request.status == RequestStatus.RUNNING:
                fit.append(request)
                continue
            pages = self._pages(request)
            full = full or (pages > room and (any_runs or bool(fit)))
            if not full:
                fit.append(request)
                room -= pages
        return fit

    def _room(self) -> int:
        """Pages that a waiting request may take."""
        manager = self.scheduler.kv_cache_manager
        free: int = manager.block_pool.get_num_free_blocks() - manager.watermark_blocks
        return free - self.scheduler._inflight_prefill_reserved_blocks()

    def _pages(self, request: Any) -> int:
        """That it takes in all."""
        groups = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return sum(cdiv(request.num_tokens, group.block_size) for group in groups)

    def _wanted_by_others(self, priority: int) -> tuple[int, int]:
        """Tokens that decodes, and that short prompts would take; only those as urgent as the long ones count."""
        scheduler, most = self.scheduler, self.limits.step_tokens

        def counts(request: Any) -> bool:
            urgent = not (self._by_priority and request.priority > priority)
            return urgent and request.request_id not in self.without_adapter and not self._is_long(request)

        decodes = short = 0
        for request in scheduler.running:
            if self._left(request) <= 1:
                decodes += 1 + scheduler.num_spec_tokens
            elif counts(request):
                short += self._left(request)
        open_to_new = scheduler.pause_state == PauseState.UNPAUSED
        if open_to_new and len(scheduler.running) < scheduler.max_num_running_reqs:
            room = self._room()
            for request in scheduler.waiting:
                if decodes + short >= most:
                    break
                if request.status in WAITING and counts(request) and (pages := self._pages(request)) <= room:
                    short += self._left(request)
                    room -= pages
        return decodes, short

    def _not_admitted(self) -> list[Any]:
        if self.granted is None:
            return []
        return [
            request
            for name, request in self.prompts.items()
            if request.status in WAITING
            and name not in self.granted
            and self._is_long(request)
            and request not in self.scheduler.kv_holding_waiting
        ]

    def _without_adapter(self) -> set[str]:
        """Requests that wait, and whose LoRA adapter has no place beside those of the requests that run."""
        scheduler = self.scheduler
        if scheduler.lora_config is None:
            return set()
        places = {adapter_of(request) for request in scheduler.running} - {0}
        without: set[str] = set()
        for request in (*scheduler.kv_holding_waiting, *scheduler.waiting):
            adapter = adapter_of(request)
            if not adapter or adapter in places:
                continue
            if len(places) < scheduler.lora_config.max_loras:
                places.add(adapter)
            else:
                without.add(request.request_id)
        return without

    def _put_back(self, hidden: list[Any], before: list[Any]) -> None:
        """Each where it stood: behind what vLLM has put in front of the queue meanwhile (it preempted them)."""
        queue = self.scheduler.waiting
        if self._by_priority:
            for request in hidden:
                queue.add_request(request)
            return
        stood = {id(request) for request in before}
        still = {id(request) for request in (*queue, *hidden)}
        merged = [request for request in queue if id(request) not in stood]
        merged += [request for request in before if id(request) in still]
        queue.clear()
        queue.extend(merged)
