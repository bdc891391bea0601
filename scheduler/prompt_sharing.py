"""The state behind scheduler/fairness.py: which prompts of a scheduler are long, and what each may take of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from scheduler.fairness import Limits, LongPrompt, share_step
from scheduler.plan import request_plan

WAITING = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class PromptSharing:
    """Shares each step of one scheduler among its prompts.

    Costs nothing while every live prompt fits in one step.
    """

    def __init__(self, scheduler: Any, limits: Limits) -> None:
        self.scheduler = scheduler
        self.limits = limits
        self.prompts: dict[str, Any] = {}
        self.found: dict[str, int] = {}
        self.granted: dict[str, int] = {}
        self.deferred = 0

    def add(self, request: Any, cached_tokens: int) -> None:
        """Know a request that just arrived; ``cached_tokens`` of its prompt could be taken from the cache then."""
        if request.num_prompt_tokens > self.limits.long_prompt:
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
            self.granted = {}
            if hidden:
                self._put_back(hidden, before)

    def bound(self, request: Any, tokens: int) -> int:
        """The part of a chunk that a request may have in this step."""
        if not self.granted:
            return tokens
        most = self.granted.get(request.request_id, 0 if self._is_long_and_running(request) else tokens)
        self.deferred += max(0, tokens - most)
        return min(tokens, most)

    def _left(self, request: Any) -> int:
        """Tokens to prefill: an estimate for a request that waits."""
        if request.status in WAITING:
            return max(1, request.num_tokens - self.found.get(request.request_id, 0))
        return request.num_tokens - request.num_computed_tokens

    def _is_long_and_running(self, request: Any) -> bool:
        known = request.request_id in self.prompts and request.status == RequestStatus.RUNNING
        return known and self._left(request) > self.limits.long_prompt

    def _long_now(self) -> list[Any]:
        """The long prompts, most urgent first."""
        for name in [name for name, request in self.prompts.items() if request.is_finished()]:
            del self.prompts[name], self.found[name]
        live = (r for r in self.prompts.values() if r.status == RequestStatus.RUNNING or r.status in WAITING)
        found = [request for request in live if self._left(request) > self.limits.long_prompt]
        if self._by_priority:
            found.sort(key=lambda request: (request.priority, request.arrival_time))
        return found

    @property
    def _by_priority(self) -> bool:
        return self.scheduler.policy == SchedulingPolicy.PRIORITY

    def _grant(self) -> dict[str, int]:
        requests = self._long_now() if self.prompts else []
        if not requests:
            return {}
        head = requests[0]
        requests = [head, *(request for request in requests[1:] if self._fits(request))]
        prompts = [
            LongPrompt(
                name=request.request_id,
                start=request.num_tokens - self._left(request),
                left=self._left(request),
                plan=request_plan(request),
                priority=request.priority if self._by_priority else 0,
            )
            for request in requests
        ]
        long_names = {prompt.name for prompt in prompts}
        return share_step(prompts, self._wanted_by_others(long_names, prompts[0].priority), self.limits)

    def _fits(self, request: Any) -> bool:
        """Whether a waiting prompt has room beside those that prefill: taken in early, it would only be preempted."""
        if request.status not in WAITING:
            return True
        manager = self.scheduler.kv_cache_manager
        pages = sum(cdiv(request.num_tokens, one.block_size) for one in manager.coordinator.single_type_managers)
        reserved = self.scheduler._inflight_prefill_reserved_blocks()
        return pages + reserved <= manager.block_pool.get_num_free_blocks()

    def _wanted_by_others(self, long_names: set[str], priority: int) -> int:
        """Tokens that decodes and short prompts would take; only short prompts as urgent as the long ones count."""
        scheduler, most = self.scheduler, self.limits.step_tokens

        def yields(request: Any) -> bool:
            return request.request_id in long_names or (self._by_priority and request.priority > priority)

        wanted = 0
        for request in scheduler.running:
            if request.num_tokens - request.num_computed_tokens <= 1:
                wanted += 1
            elif not yields(request) and not self._is_long_and_running(request):
                wanted += self._left(request)
        if len(scheduler.running) < scheduler.max_num_running_reqs:
            for request in scheduler.waiting:
                if wanted >= most:
                    break
                if request.status in WAITING and not yields(request):
                    left = self._left(request)
                    wanted += left if left <= self.limits.long_prompt else 0
        return wanted

    def _not_admitted(self) -> list[Any]:
        if not self.granted:
            return []
        return [
            request
            for name, request in self.prompts.items()
            if request.status in WAITING
            and name not in self.granted
            and self._left(request) > self.limits.long_prompt
            and request not in self.scheduler.kv_holding_waiting
        ]

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
