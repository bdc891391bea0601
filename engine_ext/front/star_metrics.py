"""Series of the API server and of the workers on vLLM's /metrics."""

from __future__ import annotations

import functools

from prometheus_client import Counter, Gauge

from starling.vllm_compat.metrics import report_to_front


class FrontMetrics:
    """Counted in the API server."""

    def __init__(self) -> None:
        self.requests = Counter("starling:requests", "Requests admitted, by prefill attention.", ["attention"])
        for attention in ("dense", "star"):
            self.requests.labels(attention)
        self.rejections = Counter("starling:plan_rejections", "Requests whose star options were refused.", ["option"])
        self.loop_stalls = Counter(
            "starling:event_loop_stalls", "Times that an API server's event loop stood still for over 0.2 s."
        )
        self.longest_loop_stall = Gauge(
            "starling:event_loop_longest_stall_seconds", "The longest of these times.", multiprocess_mode="max"
        )


class WorkerMetrics:
    """Counted from the rows handed to the attention kernel, on one rank of each engine."""

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


front_metrics = functools.cache(FrontMetrics)
worker_metrics = functools.cache(WorkerMetrics)
