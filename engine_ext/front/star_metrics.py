"""Metrics of the API server on vLLM's /metrics."""

from __future__ import annotations

import functools

from prometheus_client import Counter, Gauge


class FrontMetrics:
    """Metrics that are counted in the API server."""

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


front_metrics = functools.cache(FrontMetrics)
