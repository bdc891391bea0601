"""Origin of the KV of documents (the engine's memory, its library, other servers, or computing it), and metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import Counter, Gauge

from starling.config.entry import StarlingConfig
from starling.scheduler.part import CorePart
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import SOURCES, metadata_of
from starling.vllm_compat.kv_pages import CacheGroup, Page
from starling.vllm_compat.metrics import report_to_front

MEMORY, PEER, COMPUTED = "memory", "peer", "computed"
KINDS = (MEMORY, "host", "storage", PEER, COMPUTED)
"""The engine's own memory; host memory; files or an object store; another replica; nowhere before."""


class CacheMetrics:
    """The size and use of a compressed KV cache. Values of several engines are added up, or are equal."""

    def __init__(self) -> None:
        report_to_front()
        self.states = Gauge(
            "starling:cache_states",
            "States of compressed KV cache groups that requests hold, per layer.",
            multiprocess_mode="sum",
        )
        self.bytes_per_token = Gauge(
            "starling:cache_bytes_per_token",
            "Bytes of a page divided by its tokens, by KV cache group.",
            ["group", "kind"],
            multiprocess_mode="max",
        )
        self.capacity = Gauge(
            "starling:cache_capacity_tokens",
            "Tokens that the KV cache holds, and that it would hold with one state for each token.",
            ["cache"],
            multiprocess_mode="sum",
        )


class SchedulerMetrics:
    """Counted where steps are scheduled."""

    def __init__(self) -> None:
        report_to_front()
        self.quarantined_pages = Gauge(
            "starling:quarantined_pages",
            "KV pages out of use, since a failed transfer from another replica may still write to them.",
            multiprocess_mode="sum",
        )
        self.retained_pages = Gauge(
            "starling:retained_pages",
            "Free KV pages that make room after all others: of sessions, and of requests with star_retention.",
            multiprocess_mode="sum",
        )
        self.cache_hits = Counter(
            "starling:cache_hits",
            "Prefix cache hits: of a prompt's start (prefix), or of star blocks behind an uncached page (block).",
            ["kind"],
        )
        self.cached_tokens = Counter(
            "starling:cached_tokens", "Prompt tokens of those hits, which were not computed.", ["kind"]
        )
        for kind in ("prefix", "block"):
            self.cache_hits.labels(kind)
            self.cached_tokens.labels(kind)
        self.document_tokens = Counter(
            "starling:document_tokens",
            "Tokens of documents, by where their KV came from: memory, host, storage, peer, or computed.",
            ["source"],
        )
        for kind in KINDS:
            self.document_tokens.labels(kind)
        self.deferred_tokens = Counter(
            "starling:deferred_prefill_tokens",
            "Prefill tokens of long prompts that were left for a later step, because other requests shared the step.",
        )

    def count_sources(self, counts: Mapping[str, int]) -> None:
        """Count the tokens of a document by their kind."""
        for kind, tokens in counts.items():
            self.document_tokens.labels(kind).inc(tokens)

    def count_hit(self, kind: str, tokens: int) -> None:
        if tokens:
            self.cache_hits.labels(kind).inc()
            self.cached_tokens.labels(kind).inc(tokens)


cache_metrics = functools.cache(CacheMetrics)
scheduler_metrics = functools.cache(SchedulerMetrics)


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
