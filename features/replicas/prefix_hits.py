"""Counts the prefix hits of whole requests: those of a part of a prompt that other replicas share are no measure."""

from __future__ import annotations

from typing import Any

from starling.config.entry import StarlingConfig
from starling.scheduler.core_metrics import scheduler_metrics
from starling.scheduler.part import CorePart
from starling.scheduler.star.request_metadata import metadata_of
from starling.vllm_compat.prefix_cache import leave_out_of_hit_rate


def is_incomplete(request: Any) -> bool:
    """Return whether a request leaves tokens of its prompt to other replicas."""
    metadata = metadata_of(request)
    return metadata.part is not None or metadata.remote is not None


class PrefixHits(CorePart):
    """For each request that a step admits for the first time."""

    def __init__(self, requests: dict[str, Any]) -> None:
        self.requests = requests

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> PrefixHits:
        leave_out_of_hit_rate(is_incomplete)
        return cls(scheduler.requests)

    def scheduled(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            if not request.num_preemptions and not is_incomplete(request):
                scheduler_metrics().count_hit("prefix", new.num_computed_tokens)
