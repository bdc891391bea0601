"""vLLM's OffloadingConnector, whose pages are also found behind a prompt's first missing page.

vLLM's connector stores the pages of prompts, and loads the pages that a prompt starts with. It still does. Requests
whose star blocks are independent of one another are left to core.py, which asks for each missing page.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger

from starling.features.library.core import PATIENCE_SECONDS, PageLoads
from starling.features.library.identity import described, identity_of, layouts_of
from starling.features.library.tier import LATER_SECONDS, LibraryTier
from starling.features.library.worker import loaded_digest, may_change_weights, name_of
from starling.features.retention.core import ranges_with
from starling.scheduler.cache_keys import adapter_keys
from starling.vllm_compat.core_process import on_worker_call
from starling.vllm_compat.kv_pages import CacheGroup
from starling.vllm_compat.offloading import PageOffloading, chunks_of, tiers_of
from starling.vllm_compat.prefix_cache import add_page_keys
from starling.vllm_compat.scheduler_view import SchedulerView

logger = init_logger("vllm.starling")


RESET_SECONDS = 3.0
"""Longest wait of a reset for reads and writes of files. No step is made meanwhile."""


MAX_PAUSE_SECONDS = 0.02
"""Longest pause between two empty steps: vLLM makes one each millisecond while a request waits for pages."""

GIVEN_UP = float("-inf")
"""Stands in place of the time since which a request waits."""


@dataclass
class WorkerPages(KVConnectorHandshakeMetadata):
    """A worker's description of what the content of its pages depends on, made at the start.

    Attributes:
        digest: digest of its weights, or None if it is not known.
        layouts: layouts of its layers' pages, by the layers' names (identity.py).
    """

    digest: str | None
    layouts: dict[str, str]


def close_after_change(core: Any, method: Any) -> None:
    """Close the files of an engine core's library before a front calls a worker method that may change the weights.

    A process may have several engines (vLLM's VLLM_ENABLE_V1_MULTIPROCESSING=0), some of which have no library or no
    scheduler yet.
    """
    close = getattr(getattr(getattr(core, "scheduler", None), "connector", None), "close_files", None)
    if close is not None and may_change_weights(method):
        close(f"{name_of(method)} may have changed the model's weights")


def pause_after(empty_steps: int) -> float:
    """Return the seconds to wait before the next step: more each time, so that a slow disk keeps no core busy."""
    return min(empty_steps / 1000, MAX_PAUSE_SECONDS)


class LibraryConnector(OffloadingConnector):
    """Replacement of vLLM's OffloadingConnector for engines whose star requests may reuse pages.

    Attributes:
        page_loads: the scheduler's loads of single pages, if blocks are reused.
    """

    page_loads: PageLoads | None = None

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.vllm_config, self.kv_cache_config = vllm_config, kv_cache_config
        self.waiting: dict[str, float] = {}  # request id -> since when vLLM looks for its pages
        self.empty_steps = 0  # one after another, in which requests waited for pages
        if self.connector_scheduler is not None:
            PageOffloading.become(self.connector_scheduler)
            self.connector_scheduler.not_stored = partial(ranges_with, "low")  # type: ignore[attr-defined]
            on_worker_call(close_after_change)
            add_page_keys(adapter_keys)

    # The scheduler's side.

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Open the library's files, now that the workers have described what their pages depend on."""
        workers = [metadata[rank] for rank in sorted(metadata)]
        weights = [worker.digest for worker in workers]
        for tier in self._file_tiers():
            if None in weights:
                logger.warning("The library's files are not used: the digest of the model's weights is not known")
                continue
            description = described(self.vllm_config, weights, [worker.layouts for worker in workers])
            tier.open(identity_of(description), description)

    def make_page_loads(self, view: SchedulerView, group: CacheGroup) -> PageLoads:
        """Return the object that loads single pages from now on, for a scheduler that reuses blocks."""
        offloading = self.scheduler
        assert isinstance(offloading, PageOffloading)
        self.page_loads = PageLoads(view, group, offloading, max(chunks_of(offloading.manager) // 2, 1))
        return self.page_loads

    def close_files(self, reason: str) -> None:
        """Stop using files, since their content may be wrong from now on."""
        for tier in self._file_tiers():
            tier.close(reason)

    def reset_cache(self) -> bool | None:
        """Empty host memory; return False if a read or write of a file still uses it, so that it was not emptied."""
        if not all(tier.is_idle_within(RESET_SECONDS) for tier in self._file_tiers()):
            logger.warning("The library is not reset: its disk has not answered for %g s", RESET_SECONDS)
            return False
        return super().reset_cache()

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except TimeoutError as error:
            logger.warning("The library ends with a read or a write open: %s", error)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        loads = self.page_loads
        if loads is None or not (loads.takes(request) or loads.fetches(request)):
            return self._leading_tokens(request, num_computed_tokens)
        if not loads.fetches(request) and not loads.may_start(request, num_computed_tokens):
            return None, False
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens, max_num_new_tokens=0)

    def _leading_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Look up the pages that a prompt starts with, as vLLM does, but bound the time that the request waits."""
        found, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if found is not None:
            if self.waiting.get(request.request_id) != GIVEN_UP:
                self.waiting.pop(request.request_id, None)
            return found, is_async
        now = time.monotonic()
        if now - self.waiting.setdefault(request.request_id, now) < PATIENCE_SECONDS:
            return None, False
        if self.waiting[request.request_id] > GIVEN_UP:
            self.waiting[request.request_id] = GIVEN_UP
            logger.warning("%s: its pages in the library don't arrive: they are computed", request.request_id)
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens, max_num_new_tokens=0)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        waits = any(since > GIVEN_UP for since in self.waiting.values())
        waits = waits or (self.page_loads is not None and self.page_loads.is_waited_for)
        self.empty_steps = self.empty_steps + 1 if waits and not scheduler_output.total_num_scheduled_tokens else 0
        time.sleep(pause_after(self.empty_steps))
        return super().build_connector_meta(scheduler_output)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self.waiting.pop(request.request_id, None)
        offloading = self.scheduler
        assert isinstance(offloading, PageOffloading)
        for tier in self._file_tiers():
            left_out = offloading.keys_between(request, ranges_with("low", request))
            tier.note_used(key for key in offloading.keys_of(request) if key not in left_out)
            tier.note_used(offloading.keys_between(request, ranges_with("high", request)), LATER_SECONDS)
        return super().request_finished_all_groups(request, block_ids)

    def _file_tiers(self) -> list[LibraryTier]:
        return [tier for tier in tiers_of(self.scheduler.manager) if isinstance(tier, LibraryTier)]

    # A worker's side.

    def get_handshake_metadata(self) -> WorkerPages:
        layers = (name for group in self.kv_cache_config.kv_cache_groups for name in group.layer_names)
        return WorkerPages(loaded_digest(), layouts_of(self.vllm_config, layers))
