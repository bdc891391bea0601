"""Starling's series on vLLM's /metrics, from the API server, the engine cores and the workers.

The latter two are processes of their own. Where vLLM runs Prometheus in multiprocess mode they join it; else
they write to a directory of ours, which a collector in the API server reads at each scrape.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from engine_ext import compat

DIRECTORY = "STARLING_METRICS_DIR"


class FrontMetrics:
    """Counted where requests are admitted."""

    def __init__(self) -> None:
        self.requests = Counter("starling:requests", "Requests admitted, by prefill attention.", ["attention"])
        for attention in ("dense", "star"):
            self.requests.labels(attention)
        self.rejections = Counter("starling:plan_rejections", "Requests whose star options were refused.", ["option"])
        self.spread_blocks = Counter(
            "starling:spread_blocks", "Star blocks of prompts that went over several replicas.", ["replica"]
        )
        self.shard_requests = Counter("starling:shard_requests", "Requests whose KV stayed where it was made.")
        self.spread_seconds = Counter("starling:spread_seconds", "Seconds until all parts of such prompts were there.")

    def spread(self, blocks_of: dict[int, int], seconds: float) -> None:
        """One prompt: replica -> its star blocks."""
        for replica, blocks in blocks_of.items():
            self.spread_blocks.labels(str(replica)).inc(blocks)
        self.spread_seconds.inc(seconds)


class WorkerMetrics:
    """Counted from the rows handed to the attention kernel, on one rank of each engine."""

    def __init__(self) -> None:
        join_front()
        self.context_tokens = Counter("starling:context_tokens", "Prompt tokens prefilled in star blocks.")
        self.keys_attended = Counter(
            "starling:keys_attended",
            "Query-key pairs of those tokens, per head and full-attention layer (a mean).",
        )
        self.keys_dense = Counter("starling:keys_dense", "The pairs they would have had under dense attention.")
        self.computed_tokens = Counter(
            "starling:computed_tokens", "Tokens that the model ran over, cached and fetched ones left out.", ["replica"]
        )
        self.bytes_moved = Counter("starling:bytes_moved", "Bytes of KV pages fetched from other replicas.")
        self.move_seconds = Counter("starling:move_seconds", "Seconds that fetching them took, of each rank.")
        self.moves_failed = Counter("starling:moves_failed", "Fetches that failed, of each rank.")
        self.shard_bytes = Counter(
            "starling:shard_bytes", "Bytes of queries sent to the replicas that hold their KV, and of the answers."
        )

    def pages_moved(self, size: int, seconds: float) -> None:
        self.bytes_moved.inc(size)
        self.move_seconds.inc(seconds)


class CacheMetrics:
    """Of a compressed cache, set by each engine core. Engines beside one another are added up, or are alike."""

    def __init__(self) -> None:
        join_front()
        self.states = Gauge(
            "starling:cache_states",
            "States of compressed groups that requests hold, per layer.",
            multiprocess_mode="sum",
        )
        self.bytes_per_token = Gauge(
            "starling:cache_bytes_per_token",
            "Bytes of a page over its tokens, by KV cache group.",
            ["group", "kind"],
            multiprocess_mode="max",
        )
        self.capacity = Gauge(
            "starling:cache_capacity_tokens",
            "Tokens that the cache holds, and would hold with a state for each token.",
            ["cache"],
            multiprocess_mode="sum",
        )


cache_metrics = functools.cache(CacheMetrics)


class SchedulerMetrics:
    """Counted where steps are made, in each engine core."""

    def __init__(self) -> None:
        join_front()
        self.cache_hits = Counter(
            "starling:cache_hits",
            "Times a prompt found pages in the prefix cache: at its start, or star blocks behind a hole.",
            ["kind"],
        )
        self.cached_tokens = Counter("starling:cached_tokens", "Prompt tokens of those hits: not computed.", ["kind"])
        for kind in ("prefix", "block"):
            self.cache_hits.labels(kind)
            self.cached_tokens.labels(kind)
        self.deferred_tokens = Counter(
            "starling:deferred_prefill_tokens", "Tokens of long prompts held back in a step that others share."
        )

    def count_hit(self, kind: str, tokens: int) -> None:
        if tokens:
            self.cache_hits.labels(kind).inc()
            self.cached_tokens.labels(kind).inc(tokens)


def join_front() -> None:
    """In a process that a front has started: let metrics made from now on reach its /metrics."""
    if DIRECTORY in os.environ and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        compat.use_multiprocess_values(os.environ[DIRECTORY])


front_metrics = functools.cache(FrontMetrics)
scheduler_metrics = functools.cache(SchedulerMetrics)
worker_metrics = functools.cache(WorkerMetrics)


class WorkerCollector(Collector):
    """Reads what workers counted, at each scrape."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def describe(self) -> Iterable:
        return []

    def collect(self) -> Iterable:
        return MultiProcessCollector(None, self.directory).collect()


@functools.cache
def share_with_workers() -> tempfile.TemporaryDirectory | None:
    """Give the workers that this process is about to start a way to its /metrics.

    A directory that this process has inherited is its parent's, whose /metrics shows other workers.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return None
    directory = tempfile.TemporaryDirectory(prefix="starling-metrics-")
    os.environ[DIRECTORY] = directory.name
    REGISTRY.register(WorkerCollector(directory.name))
    return directory
