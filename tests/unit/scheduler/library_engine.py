"""The engine of simulation.py with a library: vLLM's own managers, and a worker that copies fingerprints."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.v1.outputs import KVConnectorOutput

from starling.engine_ext.start.library_connector import beside_library
from starling.features.library.beside_replicas import Handshakes, LibraryAndReplicasConnector
from starling.features.library.connector import WorkerPages
from starling.features.replicas.connector import StarConnector
from starling.features.replicas.connector_metadata import WorkerAddress
from tests.unit.scheduler.simulation import Engine, answer, make_config, make_scheduler

PAGE_SIZE = 8


def library_config(folder: Path, host_bytes: int, files: Path | None = None, **more: Any) -> Any:
    """An engine's configuration with a library, in files where there is a folder; ``more`` are vLLM's arguments."""
    entry = {"star_library": f"{files or ''}:{host_bytes}", "star": "on", "star_segments": "auto"}
    return make_config(folder, entry, block_size=PAGE_SIZE, **more)


def with_replicas(config: Any) -> Any:
    """The configuration of an engine with a library, which also prefills parts of prompts for other replicas."""
    given = copy.copy(config)
    replicas = KVTransferConfig(
        kv_connector=StarConnector.__name__,
        kv_connector_module_path=StarConnector.__module__,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
    )
    given.kv_transfer_config = beside_library(replicas, config.kv_transfer_config)
    return given


def check_chunks(manager: Any) -> None:
    """Assert that each chunk of a library's host memory is free or holds a page, and that no copy holds one."""
    host = manager.primary_tier
    held = host._policy.chunks.values()
    assert len(held) + host._get_num_free_chunks() == host._num_chunks, "chunks are lost"
    assert not any(chunk.ref_cnt for chunk in held), "chunks are pinned"
    assert len({chunk.chunk_id for chunk in held}) == len(held)


@dataclass
class Transfer:
    """A copy between pages and chunks, which is done when ``steps`` steps have passed.

    Attributes:
        request: the one that waits for a load; None: none does.
    """

    job: int
    request: str | None
    is_load: bool
    pages: list[int]
    chunks: list[int]
    steps: int


class LibraryEngine(Engine):
    """As Engine, and also does the copies of a step's metadata.

    Args:
        delay: in how many steps a load arrives.
    """

    def __init__(self, config: Any, scheduler_type: Any, num_pages: int, delay: int = 1, **kwargs: Any) -> None:
        v2 = kwargs.pop("v2", False)
        super().__init__(
            make_scheduler(config, scheduler_type, PAGE_SIZE, num_pages, v2), page_size=PAGE_SIZE, **kwargs
        )
        connector, handshake = self.scheduler.connector, WorkerPages("weights", {"layer": "layout"})
        self.has_replicas = isinstance(connector, LibraryAndReplicasConnector)
        said = Handshakes((WorkerAddress({"name": "here"}), handshake)) if self.has_replicas else handshake
        connector.set_xfer_handshake_metadata_pp_aware({(0, 0): said})
        self.library = (connector.library if self.has_replicas else connector).scheduler
        host = np.asarray(self.library.manager.primary_tier.get_kv_memoryview())
        self.chunks = host[:, : PAGE_SIZE * 8].view(np.int64)  # the memory that files are written from, and read into
        self.delay = delay
        self.stores: list[Transfer] = []  # which begin with the next step
        self.transfers: list[Transfer] = []
        self.loaded: list[int] = []  # chunks

    def close(self) -> None:
        del self.chunks  # else the memory could not be closed
        self.scheduler.connector.shutdown()

    def step(self) -> bool:
        """As Engine's; a step without tokens goes to the worker too, since its copies go on."""
        output = self.scheduler.schedule()
        tokens = bool(output.total_num_scheduled_tokens)
        metadata = output.kv_connector_metadata
        self._begin(metadata.metadata[1] if self.has_replicas else metadata)
        if tokens:
            self.in_flight.append((output, self._run(output)))
            self.steps.append(dict(output.num_scheduled_tokens))
        else:
            self._forget(output)
            self.in_flight.append((output, {}))
        while len(self.in_flight) > (self.ahead if tokens else 0):
            self._update(*self.in_flight.pop(0))
        return tokens

    def run(self, limit: int = 500) -> None:
        super().run(limit)
        for _ in range(20):  # what has been computed is stored, and copies end
            self.step()

    def _begin(self, meta: Any) -> None:
        for job, entry in list(meta.store_jobs.items()):
            if job in meta.jobs_to_flush:
                self._copy(self._transfer(job, entry, is_load=False))
                self.transfers.append(Transfer(job, None, False, [], [], 0))
                del meta.store_jobs[job]
        for transfer in [*self.stores, *self.transfers]:
            if transfer.job in meta.jobs_to_flush:
                self._copy(transfer)
                transfer.pages, transfer.chunks, transfer.steps = [], [], 0
        self.transfers += self.stores
        self.stores = [self._transfer(job, entry, is_load=False) for job, entry in meta.store_jobs.items()]
        self.transfers += [self._transfer(job, entry, is_load=True) for job, entry in meta.load_jobs.items()]

    def _transfer(self, job: int, entry: Any, is_load: bool) -> Transfer:
        chunks, pages = (entry.src_spec, entry.dst_spec) if is_load else (entry.dst_spec, entry.src_spec)
        ids = pages.block_ids.tolist(), chunks.block_ids.tolist()
        return Transfer(job, entry.req_id if is_load else None, is_load, *ids, self.delay if is_load else 0)

    def _copy(self, transfer: Transfer) -> None:
        if transfer.is_load:
            self.memory[transfer.pages] = self.chunks[transfer.chunks]
            self.loaded += transfer.chunks
        else:
            self.chunks[transfer.chunks] = self.memory[transfer.pages]

    def _update(self, output: Any, sampled: dict[str, list[int]]) -> None:
        done, self.transfers = (
            [transfer for transfer in self.transfers if transfer.steps <= 0],
            [transfer for transfer in self.transfers if transfer.steps > 0],
        )
        for transfer in done:
            self._copy(transfer)
        for transfer in self.transfers:
            transfer.steps -= 1
        meta = OffloadingWorkerMetadata()
        for transfer in done:
            meta.mark_completed(transfer.job)
        received = {transfer.request for transfer in done if transfer.request is not None}
        said = MultiKVConnectorWorkerMetadata((None, meta)) if self.has_replicas else meta
        self.finished = KVConnectorOutput(kv_connector_worker_meta=said, finished_recving=received)
        super()._update(output, sampled)

    def _answer(self, output: Any, sampled: dict[str, list[int]]) -> Any:
        result = answer(output, sampled)
        result.kv_connector_output = self.finished
        return result
