"""Series of prompts that are split over replicas, on the /metrics of the server that has the prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from prometheus_client import Counter


class SplitMetrics:
    """Counted in the API server."""

    def __init__(self) -> None:
        self.split_blocks = Counter(
            "starling:split_blocks", "Star blocks of prompts that were split over several replicas.", ["replica"]
        )
        self.split_seconds = Counter(
            "starling:split_seconds", "Seconds from the start of such prompts until all of their parts were prefilled."
        )
        self.shard_requests = Counter(
            "starling:shard_requests", "Requests whose KV stayed on the replicas that computed it."
        )

    def count_split(self, blocks_of: Mapping[str, int], seconds: float) -> None:
        """Count one split prompt; ``blocks_of`` maps each replica to its number of star blocks."""
        for replica, blocks in blocks_of.items():
            self.split_blocks.labels(replica).inc(blocks)
        self.split_seconds.inc(seconds)


split_metrics = functools.cache(SplitMetrics)
