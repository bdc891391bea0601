"""Messages between the two sides of the connector: a worker's address, pages that requests read, and its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorWorkerMetadata

from starling.features.replicas.page_transfer import TransferError


@dataclass
class WorkerAddress(KVConnectorHandshakeMetadata):
    """Address and layout by which other replicas read a worker's pages (page_transfer.py)."""

    address: dict[str, Any]


@dataclass
class PageRead:
    """Pages of one source, and where they go.

    Attributes:
        addresses: of the source's tensor-parallel ranks.
        hold: the number under which the source holds the pages.
        remote_page_ids: the pages at the source.
        local_page_ids: as many pages of this replica.
    """

    addresses: list[dict[str, Any]]
    hold: int
    remote_page_ids: list[int]
    local_page_ids: list[int]

    def address_of(self, rank: int) -> dict[str, Any]:
        """Return the address of the source's rank that a rank here reads from.

        Raises:
            TransferError: the source has fewer ranks.
        """
        if rank >= len(self.addresses):
            raise TransferError(f"the source has {len(self.addresses)} tensor-parallel ranks, and this is rank {rank}")
        return self.addresses[rank]


@dataclass
class PageLoad:
    """All pages that one request reads from other replicas."""

    request_id: str
    reads: list[PageRead]

    def local_page_ids(self) -> set[int]:
        return {page_id for read in self.reads for page_id in read.local_page_ids}


@dataclass
class PageLoads(KVConnectorMetadata):
    """Page loads that begin with a step, and holds that end with it.

    Attributes:
        loads: those that begin.
        released: numbers of this replica's holds, whose pages the step may write to.
    """

    loads: list[PageLoad] = field(default_factory=list)
    released: list[int] = field(default_factory=list)


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
