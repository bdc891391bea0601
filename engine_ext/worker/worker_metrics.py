"""Metrics of the workers on vLLM's /metrics."""

from __future__ import annotations

import functools

from prometheus_client import Counter

from starling.attention_backends.star.rows import VirtualRows
from starling.vllm_compat.metrics import report_to_front


class WorkerMetrics:
    """Metrics counted from the rows handed to the attention kernel, on one rank of each engine."""

    def __init__(self) -> None:
        report_to_front()
        self.context_tokens = Counter("starling:context_tokens", "Prompt tokens prefilled in star blocks.")
        self.keys_attended = Counter(
            "starling:keys_attended",
            "Query-key pairs of those tokens, per head and full-attention layer (a mean).",
        )
        self.keys_dense = Counter(
            "starling:keys_dense", "Query-key pairs that the same tokens would have under dense attention."
        )
        self.computed_tokens = Counter(
            "starling:computed_tokens",
            "Tokens that the model ran over; cached and fetched tokens are not among them.",
            ["replica"],
        )


worker_metrics = functools.cache(WorkerMetrics)


def count_rows(rows: VirtualRows) -> None:
    """Count the rows of a step."""
    metrics = worker_metrics()
    metrics.context_tokens.inc(rows.context_tokens)
    metrics.keys_attended.inc(rows.star_pairs)
    metrics.keys_dense.inc(rows.dense_pairs)
