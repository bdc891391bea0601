"""Prompts that are split over replicas: where their parts go on, what they wait for, and what of them is lost.

``PrefixHits`` counts the prefix hits of whole requests, since those of the parts of a prompt are no measure.
``Quarantine`` keeps pages out of use that a failed transfer may still write to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from starling.config.entry import StarlingConfig
from starling.features.replicas.connector_metadata import WorkerReport, worker_report
from starling.scheduler.part import CorePart
from starling.scheduler.planning.request_metadata import LOST, default_num_shards, metadata_of
from starling.scheduler.provenance import scheduler_metrics
from starling.vllm_compat.kv_pages import Page
from starling.vllm_compat.prefix_cache import leave_out_of_hit_rate
from starling.vllm_compat.scheduler_view import SchedulerView

logger = init_logger("vllm.starling")


class Quarantine:
    """The pages of transfers that NIXL has not ended yet. They stay out of the pool until it has.

    Attributes:
        num_writers: page id -> how many transfers may write to the page.
    """

    def __init__(self, view: SchedulerView) -> None:
        self.view = view
        self.num_writers: Counter[int] = Counter()

    def add(self, page_ids: Sequence[int]) -> None:
        """Keep pages from the pool. To be called before vLLM frees the pages of requests that have ended."""
        self.view.pool.hold(self.view.pool.pages(set(page_ids) - self.num_writers.keys()))
        self.num_writers.update(page_ids)
        logger.error(
            "NIXL can't end a failed transfer, which may still write to %d KV pages: they stay out of use until it can "
            "(%d pages in all)",
            len(set(page_ids)),
            len(self.num_writers),
        )

    def free(self, page_ids: Iterable[int]) -> None:
        """Give pages back to the pool to which no transfer writes any more."""
        self.num_writers.subtract(page_ids)
        free = [page_id for page_id, count in self.num_writers.items() if count <= 0]
        for page_id in free:
            del self.num_writers[page_id]
        self.view.pool.release(self.view.pool.pages(free))
        logger.info("%d KV pages are in use again, and %d are not", len(free), len(self.num_writers))

    def replace_pages(self, requests: Iterable[Any]) -> list[Any]:
        """Give the requests that hold such pages other ones, whose content is computed; vLLM counts it as failed.

        Returns:
            The requests for which no pages are free.
        """
        group, stuck = self.view.groups[0], self.num_writers.keys()
        return [request for request in requests if not self.view.replace_pages(group, request.request_id, stuck)]


def is_incomplete(request: Any) -> bool:
    """Return whether a request leaves tokens of its prompt to other replicas."""
    metadata = metadata_of(request)
    return metadata.part is not None or metadata.remote is not None


class PrefixHits(CorePart):
    """For each request that a step admits for the first time."""

    def __init__(self, requests: dict[str, Any]) -> None:
        self.requests = requests

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> PrefixHits:
        leave_out_of_hit_rate(is_incomplete)
        return cls(scheduler.requests)

    def scheduled(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            if not request.num_preemptions and not is_incomplete(request):
                scheduler_metrics().count_hit("prefix", new.num_computed_tokens)


class SplitPrompts(CorePart):
    """Split prefill in one scheduler: pages of parts, lost reads, and memory that is reserved.

    Args:
        kv_is_divided: whether the KV of a prompt is divided among replicas by default.

    Attributes:
        is_stalled: nothing was scheduled in the last step, and nothing runs.
        report: of the step that is read.
        ended: requests that have ended in it, each with the reason.
    """

    def __init__(self, scheduler: Any, kv_is_divided: bool) -> None:
        self.scheduler = scheduler
        self.view: SchedulerView = scheduler.view
        self.page_size: int = scheduler.block_size
        self.kv_is_divided = kv_is_divided
        self.quarantine = Quarantine(self.view)
        self.is_stalled = False
        self.held_out: list[Any] = []
        self.report = WorkerReport()
        self.ended: list[tuple[Any, str]] = []

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> SplitPrompts:
        return cls(scheduler, default_num_shards(scheduler.vllm_config) > 1)

    def arriving(self, request: Any) -> None:
        """End a request by its length if it alone fills the memory, where KV is divided.

        Else vLLM has made sure that a request of max_model_len fits.
        """
        if self.kv_is_divided and request.max_tokens:
            request.max_tokens = min(request.max_tokens, self._max_output_tokens(request))

    def _max_output_tokens(self, request: Any) -> int:
        remote = metadata_of(request).remote
        first, stop = (0, 0) if remote is None else remote.span()
        room = self.view.pool.num_pages * self.page_size
        return max(room - (request.num_prompt_tokens - (stop - first)), 1)

    def added(self, request: Any) -> None:
        remote = metadata_of(request).remote
        if remote is not None:
            self.scheduler.connector.begin_remote_attention(remote.local_name)

    def around_step(self) -> AbstractContextManager[Any] | None:
        """Let a split prompt pass the requests before it where nothing else goes on.

        A split prompt holds the pages of its parts, so a request before it may wait for just these pages. Where nothing
        else runs, both would wait for good, unless the split prompt passes. The memory it needs is reserved among the
        split prompts.
        """
        self.held_out = []
        if self.is_stalled:
            waiting = list(self.scheduler.waiting)
            split = next((request for request in waiting if metadata_of(request).is_split), None)
            self.held_out = [] if split is None else [request for request in waiting if request is not split]
        return self.view.without_waiting(self.held_out) if self.held_out else None

    def scheduled(self, output: Any) -> None:
        # The step after one in which a split prompt might pass is an ordinary one.
        self.is_stalled = not (output.total_num_scheduled_tokens or self.held_out) and self.view.nothing_runs

    def extend_hit(self, request: Any, pages: Sequence[Page], num_tokens: int) -> list[Page] | None:
        """Let a request go on behind the tokens of its prompt that other replicas compute or hold.

        A part of a prompt goes on, after the anchor, at its own first block. The pages in between are vLLM's null page,
        which takes no memory and is never hashed: no other request can find it, and star rows never read it. The part's
        own blocks have the keys of the whole prompt, and may be cached. Where the anchor is not cached, the part
        computes everything.

        A prompt whose KV stays on other replicas goes on behind what they hold; its own start is held here.
        """
        metadata = metadata_of(request)
        part, remote = metadata.part, metadata.remote
        if remote is not None:
            extended, resume = list(self.scheduler.connector.held_pages(remote.local_name)), remote.span()[1]
        elif part is not None and part.anchor_size <= num_tokens < part.start:
            extended, resume = list(pages), part.start
        else:
            return None
        extended += [self.view.pool.null_page] * (resume // self.page_size - len(extended))
        # vLLM, too, leaves the last prompt token to be computed.
        rest = request.block_hashes[len(extended) : (request.num_tokens - 1) // self.page_size]
        return extended + self.view.pool.find_run(rest)

    def before_outputs(self, output: Any) -> None:
        """End what the workers have lost before its tokens are read, and keep pages that may still be written to."""
        self.report = worker_report(output)
        if self.report.stuck_pages:
            self.quarantine.add(self.report.stuck_pages)
        self.ended = self._end_lost_requests(self.report.reasons) if self.report.reasons else []

    def outputs(self, outputs: dict[int, Any]) -> None:
        """Say of each request that has ended why."""
        if self.report.stuck_pages or self.report.freed_pages:
            self.ended += self._leave_quarantine(self.report.freed_pages)
        for request, reason in self.ended:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    kv_transfer_params={LOST: reason},
                )
            )

    def _end_lost_requests(self, lost: dict[str, str]) -> list[tuple[Any, str]]:
        """End the requests of a step that could not attend to all their keys.

        What they have computed over the shards leaves the prefix cache, and requests that share such a page end too:
        vLLM hashes a page when it is scheduled, and finds it within the same step.

        Args:
            lost: request id -> reason.

        Returns:
            (request, reason) of each request that ended.
        """
        requests = self.scheduler.requests
        wrong: set[int] = set()
        for name in lost:
            remote = metadata_of(requests[name]).remote if name in requests else None
            if remote is not None:
                wrong |= set(self._page_ids(name)[remote.span()[1] // self.page_size :])
        reasons = dict(lost)
        for name in requests:
            if name not in reasons and wrong.intersection(self._page_ids(name)):
                reasons[name] = "it shares pages with a request that could not attend to all its keys"
        self.view.evict(wrong)
        return self._finish(reasons)

    def _leave_quarantine(self, freed_pages: Sequence[int]) -> list[tuple[Any, str]]:
        """Take requests off the pages that a failed transfer may still write to, and use those it can't again.

        Returns:
            (request, reason) of each request that has ended, since there are no other pages for it.
        """
        without_pages = self.quarantine.replace_pages(self.scheduler.requests.values())
        reason = "its pages could not be fetched, and no other ones are free"
        ended = self._finish({request.request_id: reason for request in without_pages})
        if freed_pages:
            self.quarantine.free(freed_pages)
        scheduler_metrics().quarantined_pages.set(len(self.quarantine.num_writers))
        return ended

    def _finish(self, reasons: dict[str, str]) -> list[tuple[Any, str]]:
        ended = self.scheduler.finish_requests(reasons, RequestStatus.FINISHED_ERROR) if reasons else []
        return [(request, reasons[request.request_id]) for request in ended]

    def _page_ids(self, request_id: str) -> list[int]:
        return [page.block_id for page in self.view.groups[0].pages(request_id)]


PARTS = (SplitPrompts.make, PrefixHits.make)
