"""Series of a worker's page transfers and remote attention on vLLM's /metrics."""

from __future__ import annotations

import functools

from prometheus_client import Counter

from starling.vllm_compat.metrics import report_to_front


class ReplicaMetrics:
    """Counted by each rank of an engine."""

    def __init__(self) -> None:
        report_to_front()
        self.bytes_moved = Counter("starling:bytes_moved", "Bytes of KV pages fetched from other replicas.")
        self.move_seconds = Counter("starling:move_seconds", "Seconds that these fetches took, summed over ranks.")
        self.moves_failed = Counter("starling:moves_failed", "Fetches that failed, summed over ranks.")
        self.shard_bytes = Counter(
            "starling:shard_bytes", "Bytes of queries sent to the replicas that hold their KV, and of the responses."
        )

    def pages_moved(self, size: int, seconds: float) -> None:
        """Count one fetch of ``size`` bytes."""
        self.bytes_moved.inc(size)
        self.move_seconds.inc(seconds)


replica_metrics = functools.cache(ReplicaMetrics)
