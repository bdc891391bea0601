"""Star requests that a worker has: their plans, from the first step of each to its end."""

from __future__ import annotations

from typing import Any

from starling.attention_backends.star.rows import is_split
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import RequestMetadata, metadata_of


class StarRequests:
    """The metadata of the star requests that the model runner holds, by request id."""

    def __init__(self) -> None:
        self.metadata: dict[str, RequestMetadata] = {}

    def update(self, output: Any) -> dict[str, StarPlan]:
        """Update the metadata from a scheduler step.

        A preempted request keeps its plan: V1 resumes it as cached, V2 sends it out as new again.

        Returns:
            The plans of the step's requests whose rows are split, or that have KV on other replicas.
        """
        for request_id in output.finished_req_ids:
            self.metadata.pop(request_id, None)
        starts = []
        for new in output.scheduled_new_reqs:
            metadata = metadata_of(new)
            if metadata.plan is not None:
                self.metadata[new.req_id] = metadata
            starts.append((new.req_id, new.num_computed_tokens))
        if not self.metadata:
            return {}
        cached = output.scheduled_cached_reqs
        starts.extend(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        found = ((request_id, self.metadata.get(request_id), start) for request_id, start in starts)
        return {
            request_id: metadata.plan
            for request_id, metadata, start in found
            if metadata and metadata.plan and (is_split(metadata.plan, start) or metadata.remote)
        }
