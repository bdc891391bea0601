"""The Prometheus metrics of an engine core, which the features' core parts set; vLLM's /metrics has them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from prometheus_client import Counter, Gauge

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
