"""Spec of the library for vLLM's OffloadingConnector (its spec_name and spec_module_path)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from starling.config.parsing import OptionError
from starling.features.library.identity import STAMP_BYTES
from starling.vllm_compat.offloading import disown, page_ids, region_of, worker_region_of

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


class LibrarySpec(TieringOffloadingSpec):
    """vLLM's tiers, with room for a stamp in each chunk, and with a worker for CPU engines.

    The memory in /dev/shm has no name once all processes have it, so that it goes with them however they end.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        copies = 1 if self.replicated_layout else config.parallel.world_size
        if self.kv_bytes_per_chunk - self.cpu_page_size_per_worker * copies < STAMP_BYTES:
            self.kv_bytes_per_chunk += self.BLOCK_SIZE_ALIGNMENT
        size = int(self.extra_config["cpu_bytes_to_use"])
        self.num_chunks = size // self.kv_bytes_per_chunk
        if not self.num_chunks:
            reason = f"one page of this model takes {self.kv_bytes_per_chunk} bytes"
            raise OptionError("cpu_bytes_to_use", size, reason, f"{self.kv_bytes_per_chunk} or more")

    def get_manager(self) -> Any:
        manager = super().get_manager()
        region = region_of(self)
        with suppress(FileNotFoundError):
            os.unlink(region.mmap_path)
        disown(region)
        return manager

    def get_worker(self, kv_caches: Any) -> Any:
        if not current_platform.is_cpu():
            worker = super().get_worker(kv_caches)
            disown(worker_region_of(worker))
            return worker
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        disown(region)
        return HostWorker(kv_caches, region)
