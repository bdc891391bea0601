"""Series of the library on vLLM's /metrics, beside vLLM's own series of its tiers (vllm:kv_offload_*)."""

from __future__ import annotations

import functools

from prometheus_client import Counter

from starling.vllm_compat.metrics import report_to_front


class LibraryMetrics:
    """Series of the engine core's process."""

    def __init__(self) -> None:
        report_to_front()
        self.bad_files = Counter(
            "starling:library_bad_files",
            "Files of the library that could not be read or were not what was written; their pages were computed.",
        )
        self.removed_files = Counter(
            "starling:library_removed_files", "Files of the library that were removed to make room for others."
        )
        self.failed_writes = Counter(
            "starling:library_failed_writes", "Writes of pages to files that failed, as on a full disk."
        )


library_metrics = functools.cache(LibraryMetrics)
