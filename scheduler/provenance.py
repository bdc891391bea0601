"""Origin of the KV of a prompt's documents: the engine's memory, its library, other servers, or computing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from starling.config.entry import StarlingConfig
from starling.scheduler.core_metrics import COMPUTED, KINDS, MEMORY, PEER, scheduler_metrics
from starling.scheduler.part import CorePart
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import SOURCES, metadata_of
from starling.vllm_compat.kv_pages import CacheGroup, Page

Span = tuple[int, int, str]
"""(start, stop, kind): what these positions of the padded prompt came from."""


def document_sources(plan: StarPlan, spans: Iterable[Span]) -> list[dict[str, int]]:
    """For each document of a prompt, without the head, the tokens of each kind; what is in no span was computed."""
    known, found = list(spans), []
    for start, stop in plan.documents_behind_head:
        counts = dict.fromkeys(KINDS, 0)
        for first, last, kind in known:
            counts[kind] += max(0, min(last, stop) - max(first, start))
        counts[COMPUTED] = stop - start - sum(counts.values())
        found.append(counts)
    return found


class Provenance(CorePart):
    """Notes of one scheduler's requests with documents where their pages came from, until their first output.

    Args:
        requests: of the scheduler.
        group: the only KV cache group.

    Attributes:
        source_of: the kind of a page that a request takes from the prefix cache.
    """

    def __init__(self, requests: dict[str, Any], group: CacheGroup) -> None:
        self.requests = requests
        self.group = group
        self.page_size = group.page_size
        self.source_of: Callable[[Page, str], str] = lambda page, request_id: MEMORY
        self.noted: dict[str, tuple[StarPlan, list[Span]]] = {}

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> Provenance | None:
        group = scheduler.view.only_group
        return None if group is None else cls(scheduler.requests, group)

    def scheduled(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            self.start(self.requests[new.req_id], self.group.pages(new.req_id), new.num_computed_tokens)

    def start(self, request: Any, pages: Sequence[Page], num_tokens: int) -> None:
        """Note the tokens with which a request starts, which it does not compute.

        Args:
            pages: that the request holds.
        """
        metadata = metadata_of(request)
        if metadata.plan is None or not metadata.plan.documents or metadata.part is not None:
            return
        self.noted[request.request_id] = metadata.plan, []
        self.take(request, 0, pages[: num_tokens // self.page_size])
        if metadata.fetch is not None:
            spans = self.noted[request.request_id][1]
            spans[:] = with_peers(spans, *metadata.fetch.span(self.page_size))

    def take(self, request: Any, first: int, pages: Sequence[Page]) -> None:
        """Note pages of the prefix cache that a request takes, the first of which is its page ``first``."""
        if request.request_id not in self.noted:
            return
        spans = self.noted[request.request_id][1]
        for number, page in enumerate(pages, first):
            start, stop = number * self.page_size, (number + 1) * self.page_size
            kind = self.source_of(page, request.request_id)
            if spans and spans[-1][1:] == (start, kind):
                spans[-1] = (spans[-1][0], stop, kind)
            else:
                spans.append((start, stop, kind))

    def pages_freed(self, request: Any) -> None:
        if not request.is_finished():  # else its output is still to come
            self.noted.pop(request.request_id, None)

    def outputs(self, outputs: dict[int, Any]) -> None:
        """Let first outputs say where the documents of their prompts came from, and count these tokens."""
        if not self.noted:
            return
        for of_client in outputs.values():
            for output in of_client.outputs:
                for counts in self.give(output):
                    scheduler_metrics().count_sources(counts)
        self.noted = {name: spans for name, spans in self.noted.items() if name in self.requests}

    def give(self, output: Any) -> list[dict[str, int]]:
        """Add to a request's first output where its documents came from; returns it, or nothing for other outputs."""
        if output.prefill_stats is None or output.request_id not in self.noted:
            return []
        sources = document_sources(*self.noted.pop(output.request_id))
        output.kv_transfer_params = {**(output.kv_transfer_params or {}), SOURCES: sources}
        return sources


def with_peers(spans: Iterable[Span], start: int, stop: int) -> list[Span]:
    """Spans with one from other replicas in place of what they have there."""
    kept: list[Span] = []
    for first, last, kind in spans:
        kept += [(first, min(last, start), kind)] if first < start else []
        kept += [(max(first, stop), last, kind)] if last > stop else []
    return [*kept, (start, stop, PEER)]
