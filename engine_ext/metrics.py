"""Starling's series on vLLM's /metrics, from the API server and from the workers.

Workers are processes of their own. Where vLLM runs Prometheus in multiprocess mode they join it; else
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


def _join_the_front() -> None:
    """Let what this process counts from now on show up on the front's /metrics."""
    if DIRECTORY in os.environ and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        compat.use_multiprocess_values(os.environ[DIRECTORY])


class WorkerMetrics:
    """Counted from the rows handed to the attention kernel, on one rank of each engine."""

    def __init__(self) -> None:
        _join_the_front()
        self.context_tokens = Counter("starling:context_tokens", "Prompt tokens prefilled in star blocks.")
        self.keys_attended = Counter(
            "starling:keys_attended",
            "Query-key pairs of those tokens, per head and full-attention layer (a mean).",
        )
        self.keys_dense = Counter("starling:keys_dense", "The pairs they would have had under dense attention.")


class CacheMetrics:
    """Of a compressed cache, set by each engine core. Engines beside one another are added up, or are alike."""

    def __init__(self) -> None:
        _join_the_front()
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
front_metrics = functools.cache(FrontMetrics)
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
