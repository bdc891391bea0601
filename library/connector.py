"""vLLM's OffloadingConnector, whose pages are also found behind a prompt's first missing one.

vLLM's connector stores the pages of prompts, and loads those that a prompt starts with. It still does. Requests whose
star blocks are independent of one another are left to scheduler/page_loads.py, which asks for each missing page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger

from starling.library.identity import described, identity_of
from starling.library.tier import LibraryTier
from starling.replicas.weights import loaded_digest, may_change_weights, name_of
from starling.scheduler.page_loads import PageLoads
from starling.vllm_compat.engine_core import on_worker_call
from starling.vllm_compat.kv_pages import CacheGroup
from starling.vllm_compat.offloading import PageOffloading, chunks_of, tiers_of
from starling.vllm_compat.scheduler_view import SchedulerView

logger = init_logger("vllm.starling")


@dataclass
class WorkerWeights(KVConnectorHandshakeMetadata):
    """What a worker says of its weights at the start: their digest; None: it does not know."""

    digest: str | None


def close_after_change(core: Any, method: Any) -> None:
    """Close the files of an engine core's library before a front's call of its workers that may change the weights."""
    if may_change_weights(method):
        core.scheduler.connector.close_files(f"{name_of(method)} may have changed the model's weights")


class LibraryConnector(OffloadingConnector):
    """In place of vLLM's OffloadingConnector where star requests may reuse pages.

    Attributes:
        page_loads: of the scheduler, where blocks are reused.
    """

    page_loads: PageLoads | None = None

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.vllm_config = vllm_config
        if self.connector_scheduler is not None:
            PageOffloading.become(self.connector_scheduler)
            on_worker_call(close_after_change)

    # The scheduler's side.

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Open the library's files, now that the workers' weights are known."""
        weights = [metadata[rank].digest for rank in sorted(metadata)]
        for tier in self._file_tiers():
            if None in weights:
                logger.warning("The library's files are not used: the digest of the model's weights is not known")
                continue
            description = described(self.vllm_config, weights)
            tier.open(identity_of(description), description)

    def make_page_loads(self, view: SchedulerView, group: CacheGroup) -> PageLoads:
        """Load single pages from now on, for a scheduler that reuses blocks."""
        offloading = self.scheduler
        assert isinstance(offloading, PageOffloading)
        self.page_loads = PageLoads(view, group, offloading, max(chunks_of(offloading.manager) // 2, 1))
        return self.page_loads

    def close_files(self, reason: str) -> None:
        """Use no files any more, since what they hold may be wrong from now on."""
        for tier in self._file_tiers():
            tier.close(reason)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self.page_loads is None or not self.page_loads.takes(request):
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not self.page_loads.may_start(request, num_computed_tokens):
            return None, False
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens, max_num_new_tokens=0)

    def _file_tiers(self) -> list[LibraryTier]:
        return [tier for tier in tiers_of(self.scheduler.manager) if isinstance(tier, LibraryTier)]

    # A worker's side.

    def get_handshake_metadata(self) -> WorkerWeights:
        return WorkerWeights(loaded_digest())
