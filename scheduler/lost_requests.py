"""Requests that could not attend to all of their keys in a step, on their way from a worker to the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata


@dataclass
class LostRequests(KVConnectorWorkerMetadata):
    """Request id -> why a step could not attend to all of the request's keys."""

    reasons: dict[str, str]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> LostRequests:
        """Those of two workers together."""
        assert isinstance(other, LostRequests)
        return LostRequests(other.reasons | self.reasons)


def lost_requests(model_runner_output: Any) -> dict[str, str]:
    """The lost requests of a step: request id -> reason."""
    output = model_runner_output.kv_connector_output
    metadata = output.kv_connector_worker_meta if output is not None else None
    return metadata.reasons if isinstance(metadata, LostRequests) else {}
