"""Spec of the library for vLLM's OffloadingConnector (its spec_name and spec_module_path)."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from starling.config.parsing import OptionError
from starling.features.library.host_worker import HostWorker
from starling.features.library.identity import STAMP_BYTES
from starling.vllm_compat.offloading import disown, region_of, worker_region_of


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
