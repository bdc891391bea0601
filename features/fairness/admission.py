"""Admission of waiting long prompts: a prompt is admitted in a step that has a seat and pages for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.request import RequestStatus

from starling.vllm_compat.scheduler_view import SchedulerView

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
