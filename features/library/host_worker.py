"""Copies of KV pages between a CPU engine's cache and its library in host memory; for GPUs vLLM has its own worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from starling.vllm_compat.offloading import page_ids

Copies = Callable[[torch.Tensor, torch.Tensor], None]


class HostWorker(OffloadingWorker):
    """Worker that copies pages in a thread while the engine computes.

    One page of the cache is one chunk of the library (blocks_per_chunk = 1). A chunk has the pages of all layers, one
    after another.

    Args:
        caches: vLLM's view of the layers' caches, one row of bytes for each page.
        region: the library's memory, which the scheduler's process maps too.
    """

    def __init__(self, caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self.pages = [cache.tensor for cache in caches.tensors]
        self.first = caches.group_data_refs[0][0].tensor_idx
        self.chunks = [region.create_next_worker_view(cache.page_size_bytes) for cache in caches.tensors]
        self.chunk_bytes = sum(cache.page_size_bytes for cache in caches.tensors)
        self.region = region
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starling-library")
        self.jobs: dict[int, Future[TransferResult]] = {}

    def submit_store(self, job_id: int, source: Any, target: Any) -> bool:
        """Copy pages of the cache into chunks."""
        return self._submit(job_id, self.pages, self._page_ids(source), self.chunks, target.block_ids)

    def submit_load(self, job_id: int, source: Any, target: Any, expedited: bool = False) -> bool:
        """Copy chunks into pages of the cache."""
        return self._submit(job_id, self.chunks, source.block_ids, self.pages, self._page_ids(target))

    def get_finished(self) -> list[TransferResult]:
        """Return the jobs that have ended since the last call."""
        ended = [job_id for job_id, job in self.jobs.items() if job.done()]
        return [self.jobs.pop(job_id).result() for job_id in ended]

    def wait(self, job_ids: set[int]) -> None:
        """Return once these jobs have ended; ``get_finished`` still reports them."""
        for job_id in job_ids & self.jobs.keys():
            self.jobs[job_id].result()

    def shutdown(self) -> None:
        self.thread.shutdown(wait=True)
        self.pages, self.chunks = [], []
        self.region.cleanup()

    def _page_ids(self, place: Any) -> np.ndarray:
        return page_ids(place, self.pages[self.first])

    def _submit(self, job_id: int, sources: Any, source_ids: Any, targets: Any, target_ids: Any) -> bool:
        self.jobs[job_id] = self.thread.submit(self._copy, job_id, sources, source_ids, targets, target_ids)
        return True

    def _copy(self, job_id: int, sources: Any, source_ids: Any, targets: Any, target_ids: Any) -> TransferResult:
        start = time.monotonic()
        read, written = torch.from_numpy(source_ids).long(), torch.from_numpy(target_ids).long()
        for source, target in zip(sources, targets, strict=True):
            target[written] = source[read]
        seconds = time.monotonic() - start
        return TransferResult(job_id, True, len(source_ids) * self.chunk_bytes, seconds)
