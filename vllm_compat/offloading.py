"""vLLM's offloading of KV pages: loads of single pages, and what its tier of files runs in its threads.

All of this goes when vLLM's OffloadingConnector looks for pages behind a prompt's first missing one.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata, TransferJob
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    GPULoadStoreSpec,
    LookupResult,
    OffloadKey,
    PrepareStoreOutput,
    make_offload_key,
)
from vllm.v1.kv_offload.tiering.fs import thread_pool
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from starling.vllm_compat.patching import extends, touches

KINDS = {"host": "host", "p2p": "peer"}
"""vLLM's CacheHitSource -> a kind of scheduler/provenance.py; all others are files and object stores."""


@dataclass
class PageLoad:
    """Pages on their way into the cache, which no request holds.

    Attributes:
        request: the first vLLM Request that wants them.
        hashes: the pages' keys in the prefix cache.
        page_ids: ids of the pages that they are loaded into.
        kinds: places where they are: host, peer or storage.
        pending: workers that have not said that they are through.
        is_stale: True if the library was emptied meanwhile.
    """

    request: Any
    hashes: Sequence[bytes]
    page_ids: Sequence[int]
    kinds: Sequence[str]
    pending: int
    keys: Sequence[Any]
    context: Any
    is_stale: bool = False


@touches(
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler.OffloadingConnectorScheduler."
    "{_req_status, manager, config, _generate_job_id, _current_batch_load_jobs, _current_batch_allocated_block_ids, "
    "_current_batch_jobs_to_flush}",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler.RequestOffloadState."
    "{req, req_context, group_states, transfer_jobs}",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler.RequestGroupState.offload_keys",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler.SchedulerOffloadConfig.kv_group_configs",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler.GroupOffloadConfig.tokens_per_chunk",
)
class PageOffloading(OffloadingConnectorScheduler):
    """vLLM's scheduler side of offloading, which also loads single pages that no request holds yet.

    Attributes:
        on_loaded: called with each PageLoad whose pages have arrived, or never will (is_stale).
        not_stored: called with a Request: start and end of the ranges of its tokens whose pages are not stored.
    """

    page_loads: dict[int, PageLoad]
    on_loaded: Callable[[PageLoad], None]
    not_stored: Callable[[Any], Sequence[tuple[int, int]]]

    @classmethod
    def become(cls, scheduler: OffloadingConnectorScheduler) -> None:
        """Make the scheduler side of vLLM's connector, which makes it itself, one of these."""
        scheduler.__class__ = cls
        assert isinstance(scheduler, PageOffloading)
        scheduler.page_loads = {}
        scheduler.on_loaded = lambda load: None
        scheduler.not_stored = lambda request: ()
        prepare_store = scheduler.manager.prepare_store

        def prepare(keys: Collection[OffloadKey], context: Any) -> PrepareStoreOutput | None:
            status = scheduler._req_status[context.req_id]
            left_out = scheduler._keys_between(status, scheduler.not_stored(status.req))
            kept = [key for key in keys if key not in left_out]
            unique = list(dict.fromkeys(kept))
            return for_each_position(prepare_store(unique, context), kept)

        scheduler.manager.prepare_store = prepare  # type: ignore[method-assign, assignment]

    def begin_step(self) -> None:
        """Begin a step; to be called before pages are looked up in a step that is about to be scheduled."""
        acquire = getattr(self, "_acquire_step", None)  # vLLM 0.33: its lock, until build_connector_meta
        if acquire is not None:
            acquire()

    def knows(self, request: Any) -> bool:
        """Return whether vLLM has announced a request that has not ended."""
        return request.request_id in self._req_status

    def keys_of(self, request: Any) -> list[OffloadKey]:
        """Return the keys of a request's pages; none for a request that vLLM has not announced."""
        status = self._req_status.get(request.request_id)
        return [] if status is None else [key for group in status.group_states for key in group.offload_keys]

    def keys_between(self, request: Any, ranges: Sequence[tuple[int, int]]) -> set[OffloadKey]:
        """Return the keys of a request's pages that start in one of these ranges of its tokens."""
        status = self._req_status.get(request.request_id)
        return set() if status is None else self._keys_between(status, ranges)

    def _keys_between(self, status: Any, ranges: Sequence[tuple[int, int]]) -> set[OffloadKey]:
        groups = zip(self.config.kv_group_configs, status.group_states, strict=True) if ranges else ()
        return {
            key
            for config, group in groups
            for index, key in enumerate(group.offload_keys)
            if any(start <= index * config.tokens_per_chunk < end for start, end in ranges)
        }

    def lookup(self, request: Any, page_hash: bytes, group: int) -> LookupResult:
        """Look up a page: HIT in host memory, MISS nowhere, else on its way there, or not known yet."""
        key = make_offload_key(page_hash, group)
        return self.manager.lookup(key, self._req_status[request.request_id].req_context)

    def load(self, request: Any, hashes: Sequence[bytes], page_ids: Sequence[int], group: int) -> None:
        """Load pages that ``lookup`` has just found into pages that nothing else uses, in this step."""
        context = self._req_status[request.request_id].req_context
        keys = [make_offload_key(page_hash, group) for page_hash in hashes]
        source = self.manager.prepare_load(keys, context)
        target = GPULoadStoreSpec(list(page_ids), group_sizes=[len(page_ids)], block_indices=[0])
        job = self._generate_job_id()
        self._current_batch_load_jobs[job] = TransferJob(req_id=None, src_spec=source, dst_spec=target)  # type: ignore[arg-type]
        self._current_batch_allocated_block_ids.update(page_ids)  # what is still stored from them is stored first
        kinds = [KINDS.get(self.manager.get_load_source(key, context).value, "storage") for key in keys]
        self.page_loads[job] = PageLoad(request, hashes, page_ids, kinds, self.config.num_workers, keys, context)

    # vLLM's methods.

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        # A request that goes out as new once more has all of its pages in this step.
        for new in scheduler_output.scheduled_new_reqs:
            for group in self._req_status[new.req_id].group_states:
                group.block_ids.clear()
        with self._without_new_loads(scheduler_output.preempted_req_ids or ()):
            return super().build_connector_meta(scheduler_output)

    def _remove_pending_job(self, job_id: int, block_ids: list[int] | None) -> None:
        """Remove a job from the pages that it stores.

        Documents that repeat in a prompt share pages, and vLLM expects each page of a job once. Goes when vLLM takes a
        page that a job names twice.
        """
        super()._remove_pending_job(job_id, list(dict.fromkeys(block_ids or ())))

    def has_pending_push_work(self) -> bool:
        return bool(self.page_loads) or super().has_pending_push_work()

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, OffloadingWorkerMetadata):
            for job in self.page_loads.keys() & meta.completed_jobs.keys():
                load = self.page_loads[job]
                load.pending -= meta.completed_jobs.pop(job)
                if not load.pending:
                    del self.page_loads[job]
                    self._end(load)
        super().update_connector_output(connector_output)

    def reset_cache(self) -> None:
        if self._current_batch_jobs_to_flush:
            return  # no step was scheduled since the last reset, and vLLM asserts that one was
        for load in self.page_loads.values():
            load.is_stale = True
        super().reset_cache()
        self._current_batch_jobs_to_flush.update(self.page_loads)

    @contextmanager
    def _without_new_loads(self, request_ids: Iterable[str]) -> Iterator[None]:
        """Keep loads of this step from vLLM, which expects preempted requests to have stores alone.

        A request that a reset of the prefix cache preempts may start again in the next step. Goes with vLLM 0.32.
        """
        statuses = [self._req_status[name] for name in request_ids if name in self._req_status]
        hidden = [status.transfer_jobs & self._current_batch_load_jobs.keys() for status in statuses]
        for status, jobs in zip(statuses, hidden, strict=True):
            status.transfer_jobs -= jobs
        yield
        for status, jobs in zip(statuses, hidden, strict=True):
            status.transfer_jobs |= jobs

    def _end(self, load: PageLoad) -> None:
        if not load.is_stale:
            locked = getattr(self, "_manager_locked", None)  # vLLM 0.33
            if locked is None:
                self.manager.complete_load(load.keys, load.context)
            else:
                with locked():
                    self.manager.complete_load(load.keys, load.context)
        self.on_loaded(load)


def for_each_position(prepared: PrepareStoreOutput | None, keys: Sequence[OffloadKey]) -> PrepareStoreOutput | None:
    """Return what a manager has prepared for the keys of ``keys``, with the chunk of a key at each of its positions.

    vLLM copies a page for each position of a prompt. A manager that is given a key twice takes two chunks, and never
    frees the first. With keys ``a b a``, of which the manager stores ``a`` in chunk 7, the result has chunks ``7 7``.
    Goes when vLLM's managers take a key once.
    """
    if prepared is None or len(prepared.keys_to_store) == len(keys):
        return prepared
    spec = prepared.store_spec
    assert isinstance(spec, BlockIDsLoadStoreSpec)
    chunks = dict(zip(prepared.keys_to_store, spec.block_ids.tolist(), strict=True))
    stored = [key for key in keys if key in chunks]
    return replace(prepared, keys_to_store=stored, store_spec=type(spec)([chunks[key] for key in stored]))


def say_io_errors_once() -> None:
    """Leave out vLLM's line for each job of its tier of files that fails: the tier's subclass says it, now and then."""
    logging.getLogger(thread_pool.__name__).addFilter(_is_no_io_error)


def _is_no_io_error(record: logging.LogRecord) -> bool:
    return "block I/O failed" not in record.msg


def ends_within(work: Callable[[], object], seconds: float) -> bool:
    """Run something in a thread of its own; returns whether it has ended after ``seconds``."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@touches(
    "vllm.v1.kv_offload.tiering.fs.manager.FileSystemTierManager.{_pool, _primary_kv_view, _use_o_direct}",
    "vllm.v1.kv_offload.tiering.fs.manager.FileSystemTierManager.{_load_job_keys, _job_block_counts, _load_progress}",
    "vllm.v1.kv_offload.tiering.fs.thread_pool.DualQueueThreadPool.{enqueue_store, enqueue_load, wait_idle}",
)
@touches("vllm.v1.kv_offload.tiering.fs.manager.FileSystemTierManager._store_job_keys", before="0.34")
@touches("vllm.v1.kv_offload.tiering.fs.manager.FileSystemTierManager._store_jobs", since="0.34")
@extends(FileSystemTierManager)
class FileTier:
    """Mixed into vLLM's tier of files, before it: the tasks of its threads are methods of the subclass.

    A subclass has store_pages and load_pages, with the pages' keys and their chunks.
    """

    store_pages: Callable[[list[OffloadKey], list[int]], None]
    load_pages: Callable[[list[OffloadKey], list[int]], None]
    events: Any
    _pool: Any
    _primary_kv_view: memoryview
    _use_o_direct: bool

    @property
    def uses_o_direct(self) -> bool:
        return self._use_o_direct

    def chunks_as_bytes(self) -> memoryview:
        """Return the library's host memory, one chunk after another."""
        return self._primary_kv_view.cast("B")

    def is_idle_within(self, seconds: float) -> bool:
        """Return whether all reads and writes that were asked for end within ``seconds``."""
        return ends_within(self._pool.wait_idle, seconds)

    def submit_store(self, job_metadata: Any) -> None:
        keys, chunks = list(job_metadata.keys), list(map(int, job_metadata.chunk_ids))
        if hasattr(self, "_store_jobs"):  # since vLLM 0.34, which also marks stored keys as present by it
            self._store_jobs[job_metadata.job_id] = job_metadata
        elif self.events is not None:
            self._store_job_keys[job_metadata.job_id] = keys  # type: ignore[attr-defined]
        self._job_block_counts[job_metadata.job_id] = len(keys)  # type: ignore[attr-defined]
        self._pool.enqueue_store(job_metadata.job_id, 1, [functools.partial(self.store_pages, keys, chunks)])

    def submit_load(self, job_metadata: Any) -> None:
        job_id, keys, chunks = job_metadata.job_id, list(job_metadata.keys), list(map(int, job_metadata.chunk_ids))
        self._load_job_keys[job_id] = keys  # type: ignore[attr-defined]
        self._job_block_counts[job_id] = len(keys)  # type: ignore[attr-defined]

        def load() -> None:
            try:
                self.load_pages(keys, chunks)
            except OSError as error:
                self._load_progress[job_id] = getattr(error, "num_succeeded", 0)  # type: ignore[attr-defined]
                raise

        self._pool.enqueue_load(job_id, 1, [load])


@touches(
    "vllm.v1.kv_offload.tiering.manager.TieringOffloadingManager.secondary_tiers",
    "vllm.v1.kv_offload.tiering.manager.TieringOffloadingManager.primary_tier",
    "vllm.v1.kv_offload.cpu.manager.CPUOffloadingManager._num_chunks",
)
def tiers_of(manager: Any) -> list[Any]:
    """Return the tiers beyond host memory; none for a manager of host memory alone."""
    return getattr(manager, "secondary_tiers", [])


def chunks_of(manager: Any) -> int:
    """Return the number of chunks of host memory."""
    return getattr(manager, "primary_tier", manager)._num_chunks


@touches("vllm.v1.kv_offload.base.DevicePointers.{ptrs, group_block_counts}", since="0.34")
def page_ids(place: Any, pages: torch.Tensor) -> np.ndarray:
    """Return the numbers of the cache's pages that a transfer of an offloading worker reads or writes.

    vLLM 0.34 has resolved them to addresses before it calls the worker. Goes when it hands page numbers on.

    Args:
        place: a GPULoadStoreSpec, or since vLLM 0.34 DevicePointers, of pages of the only KV cache group.
        pages: (pages, bytes of a page) the tensor of the group's first layer.

    Returns:
        (pages of the transfer,) int64.
    """
    if isinstance(place, GPULoadStoreSpec):
        return place.block_ids
    addresses = place.ptrs[: place.group_block_counts[0]].astype(np.int64)
    return (addresses - pages.data_ptr()) // pages.stride(0)


@touches("vllm.v1.kv_offload.tiering.spec.TieringOffloadingSpec._scheduler_mmap")
def region_of(spec: Any) -> Any:
    """Return the memory in /dev/shm that a spec's manager has mapped."""
    return spec._scheduler_mmap


@touches("vllm.v1.kv_offload.cpu.gpu_worker.CPUOffloadingWorker._mmap_region")
def worker_region_of(worker: Any) -> Any:
    """Return the memory in /dev/shm that vLLM's worker on a GPU has mapped."""
    return worker._mmap_region


@touches("vllm.v1.kv_offload.cpu.shared_offload_region.SharedOffloadRegion._creator")
def disown(region: Any) -> None:
    """Leave the name of a memory in /dev/shm to who removes it.

    vLLM 0.32 logs a traceback where the name that it would remove is gone. Goes with that version: 0.33 takes it as it
    is.
    """
    region._creator = False
