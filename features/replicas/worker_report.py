"""Report of workers to the scheduler about a step: requests that are lost, and pages that may still be written to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorWorkerMetadata


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """One step of one worker, or of all tensor-parallel ranks together.

    Attributes:
        reasons: request id -> why the step could not attend to all of the request's keys.
        stuck_pages: pages to which a failed transfer may still write from now on; once for each transfer and rank.
        freed_pages: such pages to which it can't any more.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    stuck_pages: list[int] = field(default_factory=list)
    freed_pages: list[int] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """Return the reports of two workers as one."""
        assert isinstance(other, WorkerReport)
        return WorkerReport(
            other.reasons | self.reasons,
            self.stuck_pages + other.stuck_pages,
            self.freed_pages + other.freed_pages,
        )


def worker_report(model_runner_output: Any) -> WorkerReport:
    """Return the report of a step, an empty one if the workers have nothing to report."""
    output = model_runner_output.kv_connector_output
    metadata = output.kv_connector_worker_meta if output is not None else None
    parts = metadata.metadata if isinstance(metadata, MultiKVConnectorWorkerMetadata) else (metadata,)
    return next((part for part in parts if isinstance(part, WorkerReport)), WorkerReport())
