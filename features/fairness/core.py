"""Bounds of long prompts: their number, and their chunks in each step (step_budget.py divides the step's tokens)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from starling.config.entry import StarlingConfig
from starling.config.scheduling import MIN_CHUNK
from starling.features.fairness.step_budget import Limits, LongPrompt, divide_step, make_limits
from starling.features.reuse.core import num_cached_tokens
from starling.scheduler.part import CorePart
from starling.scheduler.planning.request_metadata import metadata_of
from starling.scheduler.provenance import scheduler_metrics
from starling.vllm_compat.scheduler_view import SchedulerView, started_ids

WAITING = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class Admission:
    """The admission of long prompts to one scheduler.

    A prompt that is admitted without room for its pages would only be preempted: no prompt is admitted beside running
    long prompts unless it fits, and none passes an earlier one that does not fit. If no long prompt runs, vLLM decides
    whether the first one fits, so that it is admitted once the other requests have ended. Short prompts may pass it in
    every second step, until together they have a quarter of its tokens; with priority scheduling they may not.

    A long prompt leaves the last free seat (vLLM's max_num_seqs, max_num_active_seqs) to short prompts while another
    long prompt runs.

    Attributes:
        passed: the first long prompt, while requests behind it may be admitted in its place.
        tokens_before: long prompt -> tokens of the requests that have been admitted in its place.
    """

    def __init__(self, view: SchedulerView) -> None:
        self.view = view
        self.passed: str | None = None
        self.tokens_before: dict[str, int] = {}
        self.head_without_room: str | None = None

    def begin_step(self, requests: Sequence[Any]) -> list[Any]:
        """Return the long prompts that run or may be admitted in this step, most urgent first.

        Args:
            requests: the long prompts, most urgent first.
        """
        running = [request for request in requests if request.status == RequestStatus.RUNNING]
        head = requests[0].request_id if requests and not running else None
        self.passed = head if head is not None and self._may_be_passed(requests[0]) else None
        if self.passed is not None:
            return []
        room = self.view.num_pages_for_waiting
        seats = self.view.num_free_seats
        admitted: list[Any] = []
        full = False
        for request in requests:
            if request.status == RequestStatus.RUNNING:
                admitted.append(request)
                continue
            if full:
                continue
            num_pages = self.view.num_pages_of(request)
            before = admitted if self.view.by_priority else admitted or running
            full = seats <= bool(before) or (num_pages > room and bool(admitted or running))
            if not full:
                admitted.append(request)
                room -= num_pages
                seats -= 1
        return admitted

    def count(self, admitted: Iterable[Any]) -> None:
        """Note which requests were admitted in this step."""
        if self.passed is not None:
            tokens = sum(request.num_tokens for request in admitted)
            self.tokens_before[self.passed] = self.tokens_before.get(self.passed, 0) + tokens

    def end_step(self, head: Any | None) -> None:
        """Take note that a step has been scheduled.

        Args:
            head: the most urgent long prompt, if it was to get tokens in this step.
        """
        self.passed = None
        waits = head is not None and head.status in WAITING and self.view.admits_requests
        self.head_without_room = head.request_id if head is not None and waits and self._lacks_room(head) else None

    def forget(self, name: str) -> None:
        """Forget a request that has ended."""
        self.tokens_before.pop(name, None)

    def _may_be_passed(self, head: Any) -> bool:
        if self.view.by_priority or head.request_id != self.head_without_room:
            return False
        return self.tokens_before.get(head.request_id, 0) < head.num_tokens // 4 and self._lacks_room(head)

    def _lacks_room(self, request: Any) -> bool:
        return self.view.num_pages_of(request) > self.view.num_pages_for_waiting


logger = init_logger("vllm.starling")


def adapter_of(request: Any) -> int:
    """Return the number of a request's LoRA adapter, or 0 if it has none."""
    return request.lora_request.lora_int_id if request.lora_request else 0


class PrefillLimiter(CorePart):
    """Bounds of the chunks of long prompts in each step of one scheduler.

    They cost nothing while every live prompt fits in one step.
    """

    def __init__(self, scheduler: Any, limits: Limits) -> None:
        self.scheduler = scheduler
        self.view = SchedulerView(scheduler)
        self.limits = limits
        self.prompts: dict[str, Any] = {}
        self.cached_tokens: dict[str, int] = {}
        self.granted: dict[str, int] | None = None  # while a step is scheduled, and there are long prompts
        self.deferred = 0
        self.skipped_long = False  # a step went to short prompts alone, and no long prompt has had a chunk since
        self.without_adapter: set[str] = set()
        self.deferred_steps = 0  # steps without any prefill since the last one with
        self.prefills = False  # this step has tokens of a prompt
        self.long_runs = False  # a long prompt runs
        self.admission = Admission(self.view)

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> PrefillLimiter | None:
        if config.scheduling.fairness != "on":
            return None
        if not scheduler.scheduler_config.enable_chunked_prefill:
            reason = "chunked prefill is off, so a prompt is prefilled in one step"
            logger.warning("--scheduler-fairness has no effect here: %s", reason)
            return None
        step_tokens, unit = scheduler.max_num_scheduled_tokens, scheduler.view.chunk_unit
        return cls(scheduler, make_limits(config.scheduling, step_tokens, unit))

    def may_be_long(self, request: Any) -> bool:
        """Return whether an arriving request may be a long prompt; one with images that must not be cut is none."""
        uncut = request.mm_features and self.scheduler.scheduler_config.disable_chunked_mm_input
        return request.num_prompt_tokens > self.limits.long_prompt and not uncut

    def added(self, request: Any) -> None:
        """Take in a request that may be a long prompt.

        It counts as long if enough of its tokens are not cached when it arrives, and until it ends: its last chunks
        are as deep as those before.
        """
        if self.may_be_long(request):
            self.prompts[request.request_id] = request
            self.cached_tokens[request.request_id] = num_cached_tokens(self.scheduler, request)

    def around_step(self) -> AbstractContextManager[Any] | None:
        return self.step() if self.prompts else None

    def scheduled(self, output: Any) -> None:
        self.admission.count(self.scheduler.requests[name] for name in started_ids(output))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Bound long prompts while a step is scheduled, and take waiting ones that get no tokens out of the queue.

        With --prefill-schedule-interval, vLLM leaves all prefills out of some steps; their shares go to the next step.
        """
        self.deferred, self.prefills = 0, False
        self.granted = self._grant(self.limits.for_steps(1 + self.deferred_steps))
        held_out = self._not_admitted()
        try:
            with self.view.without_waiting(held_out):
                yield
            self.deferred_steps = self.deferred_steps + 1 if self.long_runs and not self.prefills else 0
            if held_out and self.prefills:
                self.view.note_backlog()
            scheduler_metrics().deferred_tokens.inc(self.deferred)
        finally:
            self.admission.end_step(self.prompts.get(next(iter(self.granted or ()), "")))
            self.granted = None

    def bound(self, request: Any, start: int, tokens: int) -> int:
        """Return how many of ``tokens`` a request may have in this step."""
        if self.granted is None:
            return tokens
        is_long = request.status == RequestStatus.RUNNING and self._is_long(request)
        limit = self.granted.get(request.request_id, 0 if is_long else tokens)
        if not limit and self.without_adapter and adapter_of(request):
            # vLLM 0.32 counts the adapters of a step: a request that is not in the step would lose its slot to another
            # one. vLLM 0.33 counts those of all running requests, and this goes with 0.32.
            limit = MIN_CHUNK
        bounded = self.view.shorten_chunk(request, start, tokens, limit)
        self.deferred += tokens - bounded
        if bounded and request.request_id in self.granted:
            self.skipped_long = False
        self.prefills = self.prefills or (bounded > 0 and start < request.num_prompt_tokens)
        return bounded

    def _left(self, request: Any) -> int:
        """Return the tokens that a request has yet to prefill, an estimate if it waits."""
        if request.status in WAITING:
            known = max(self.cached_tokens.get(request.request_id, 0), request.num_computed_tokens)
            return max(1, request.num_tokens - known)
        return request.num_tokens - request.num_computed_tokens

    def _is_long(self, request: Any) -> bool:
        """Return whether a request is a long prompt whose prefill is not done."""
        cached = self.cached_tokens.get(request.request_id)
        is_long = cached is not None and request.num_prompt_tokens - cached > self.limits.long_prompt
        return is_long and self._left(request) > 1

    def _long_prompts(self) -> list[Any]:
        """Return the long prompts, most urgent first."""
        for name in [name for name, request in self.prompts.items() if request.is_finished()]:
            del self.prompts[name], self.cached_tokens[name]
            self.admission.forget(name)
        live = (r for r in self.prompts.values() if r.status == RequestStatus.RUNNING or r.status in WAITING)
        found = [request for request in live if self._is_long(request)]
        if self.view.by_priority:
            found.sort(key=lambda request: (request.priority, request.arrival_time))
        return found

    def _grant(self, limits: Limits) -> dict[str, int] | None:
        """Return the tokens that each long prompt may have in a step, or None if there are no long prompts.

        Long prompts that are not named get none.
        """
        long_prompts = self._long_prompts()
        self.long_runs = any(request.status == RequestStatus.RUNNING for request in long_prompts)
        self.without_adapter = self._without_adapter(())
        requests = [r for r in long_prompts if r.request_id not in self.without_adapter]
        if not requests:
            return None
        requests = self.admission.begin_step(requests)
        self.without_adapter = self._without_adapter([r for r in long_prompts if r not in requests])
        if not requests:
            return {}
        prompts = [
            LongPrompt(
                name=request.request_id,
                start=request.num_tokens - self._left(request),
                left=self._left(request),
                runs=request.status == RequestStatus.RUNNING,
                plan=metadata_of(request).plan,
                priority=request.priority if self.view.by_priority else 0,
            )
            for request in requests
        ]
        decodes, short = self._wanted_by_others(prompts[0].priority)
        if short and prompts[0].runs and not self.skipped_long:
            self.skipped_long = True
            return {}
        return divide_step(prompts, decodes + short, limits)

    def _wanted_by_others(self, priority: int) -> tuple[int, int]:
        """Return the tokens that decodes would take, and those that short prompts would take.

        Args:
            priority: priority of the most urgent long prompt. Short prompts that are less urgent do not count.
        """
        limit = self.limits.step_tokens

        def counts(request: Any) -> bool:
            urgent = not (self.view.by_priority and request.priority > priority)
            return urgent and request.request_id not in self.without_adapter and not self._is_long(request)

        decodes = short = 0
        for request in self.scheduler.running:
            if self._left(request) <= 1:
                decodes += self.view.tokens_of_a_decode
            elif counts(request):
                short += self._left(request)
        if self.view.admits_requests:
            room = self.view.num_pages_for_waiting
            for request in self.scheduler.waiting:
                if decodes + short >= limit:
                    break
                if request.status not in WAITING or not counts(request):
                    continue
                room -= self.view.num_pages_of(request)
                if room < 0:  # vLLM stops at a request that does not fit
                    break
                short += self._left(request)
        return decodes, short

    def _not_admitted(self) -> list[Any]:
        """Return the waiting long prompts that get no tokens in this step."""
        if self.granted is None:
            return []
        return [
            request
            for name, request in self.prompts.items()
            if request.status in WAITING
            and name not in self.granted
            and self._is_long(request)
            and not self.view.holds_pages_while_waiting(request)
        ]

    def _without_adapter(self, held_out: Sequence[Any]) -> set[str]:
        """Return the ids of waiting requests whose LoRA adapter finds no slot beside those of the running requests.

        Args:
            held_out: requests that are not admitted in this step, and take no slot. Requests that wait for something
                else, such as a grammar, take none either, but may be admitted in this step.
        """
        max_loras = self.view.max_loras
        if max_loras is None:
            return set()
        in_slots = {adapter_of(request) for request in self.scheduler.running} - {0}
        without: set[str] = set()
        for request in self.view.all_waiting():
            adapter = adapter_of(request)
            if not adapter or adapter in in_slots:
                continue
            if len(in_slots) < max_loras and request.status in WAITING and request not in held_out:
                in_slots.add(adapter)
            else:
                without.add(request.request_id)
        return without


PARTS = (PrefillLimiter.make,)
