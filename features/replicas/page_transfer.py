"""Reads of whole KV pages between engine processes, with NIXL, the library that vLLM itself uses.

NIXL uses shared memory on one host, and TCP or RDMA between hosts, as UCX finds.

A page here is one of the scheduler's. An attention kernel may divide it into several pages of its own, which are
adjacent in memory. NIXL reports when a transfer is done, but not how far it is, and a prompt's pages may be 100 GB on a
slow link. Therefore pages are read in waves of a few seconds each: on a slow link the waves end, on a cut one they time
out. The first one is small, and that of a later read as large as the link has shown to carry. Behind the last wave
comes a read of whether the source still holds the pages (`Holds`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from prometheus_client import Counter
from vllm.logger import init_logger

from starling.features.replicas.network import make_agent
from starling.vllm_compat.metrics import report_to_front

WORDS = 4096
WORD_BYTES = 8
UNKNOWN = 2**63 - 1
"""An answer that has not arrived; as the highest number it means that the hold is released."""


class Holds:
    """The released holds of one worker, and the answers that it has read of others.

    Args:
        agent: the worker's NIXL agent.
    """

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.released = torch.zeros(WORDS, dtype=torch.int64)
        self.answers = torch.full((WORDS,), UNKNOWN)
        self._unused = list(range(WORDS))
        regions = [(words.data_ptr(), WORDS * WORD_BYTES, 0, "") for words in (self.released, self.answers)]
        self.registered = agent.register_memory(regions, "DRAM")

    @property
    def address(self) -> int:
        """Return the address at which other workers read the released holds."""
        return self.released.data_ptr()

    def note_released(self, holds: Iterable[int]) -> None:
        """Let readers know that the pages of these holds are no longer held."""
        for hold in holds:
            self.released[hold % WORDS] = max(hold, int(self.released[hold % WORDS]))

    def new_answer(self) -> int:
        """Return an answer that no other read uses; free it when nothing may write to it any more."""
        answer = self._unused.pop()
        self.answers[answer] = UNKNOWN
        return answer

    def free_answer(self, answer: int | None) -> None:
        if answer is not None:
            self._unused.append(answer)

    def descriptors(self, answer: int, address: int, hold: int) -> tuple[Any, Any]:
        """NIXL's lists, local and remote, for the read of an answer from a worker's ``address``."""
        local = (self.answers.data_ptr() + answer * WORD_BYTES, WORD_BYTES, 0)
        remote = (address + hold % WORDS * WORD_BYTES, WORD_BYTES, 0)
        return self.agent.get_xfer_descs([local], "DRAM"), self.agent.get_xfer_descs([remote], "DRAM")

    def was_held(self, answer: int, hold: int) -> bool:
        """Return whether the answer says that the hold was not released."""
        return int(self.answers[answer]) < hold

    def close(self) -> None:
        self.agent.deregister_memory(self.registered)


class ReplicaMetrics:
    """Counted by each rank of an engine."""

    def __init__(self) -> None:
        report_to_front()
        self.bytes_moved = Counter("starling:bytes_moved", "Bytes of KV pages fetched from other replicas.")
        self.move_seconds = Counter("starling:move_seconds", "Seconds that these fetches took, summed over ranks.")
        self.moves_failed = Counter("starling:moves_failed", "Fetches that failed, summed over ranks.")
        self.shard_bytes = Counter(
            "starling:shard_bytes", "Bytes of queries sent to the replicas that hold their KV, and of the responses."
        )

    def pages_moved(self, size: int, seconds: float) -> None:
        """Count one fetch of ``size`` bytes."""
        self.bytes_moved.inc(size)
        self.move_seconds.inc(seconds)


replica_metrics = functools.cache(ReplicaMetrics)


logger = init_logger("vllm.starling")

FIRST_WAVE_BYTES = 64 * 2**20
"""Bytes of the first read over a link."""

WAVE_SECONDS = 2.0
"""Seconds that later waves should take: longer than an engine's step, at whose end the next wave begins."""

MAX_GROWTH = 8
"""A wave is at most this many times as large as the wave before it."""


class TransferError(Exception):
    """Pages can't be read; says why."""


@dataclass
class SourceRead:
    """The read of one source's pages: some have arrived, one wave is under way, and the rest follow.

    Attributes:
        hold: the source's number of the hold.
        wave: pages of a wave.
        num_begun: pages that have arrived or are under way.
        num_arrived: pages of the waves that have ended.
        answer: of the source, whether it still holds the pages; None until all pages have arrived.
        handle: NIXL's handle of the wave or the answer under way.
        started: when that began.
    """

    address: dict[str, Any]
    hold: int
    remote_page_ids: Sequence[int]
    local_page_ids: Sequence[int]
    wave: int
    num_begun: int = 0
    num_arrived: int = 0
    answer: int | None = None
    handle: Any = None
    started: float = 0.0

    @property
    def name(self) -> str:
        return self.address["name"]


@dataclass(frozen=True)
class StuckRead:
    """A read whose handle NIXL does not release. It may still write to ``page_ids`` of this worker, or its answer."""

    source: str
    handle: Any
    page_ids: list[int]
    answer: int | None


class Transfer:
    """The reads under way for one request, one for each source."""

    def __init__(self) -> None:
        self.reads: list[SourceRead] = []
        self.num_bytes = 0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the transfer began."""
        return time.monotonic() - self.started


class PageReader:
    """Makes the pages of one worker readable by other workers, and reads pages of theirs.

    Args:
        name: unique among all workers.
        kv_caches: layer -> its KV cache, whose first dimension counts the kernel's pages.
        num_pages: pages of the scheduler.
        layout: what must be equal at both ends for pages to be copied as they are; values are numbers and strings.
        timeout: seconds; a read fails if one of its waves takes longer.

    Raises:
        TransferError: a layer does not have each page in one piece.
    """

    def __init__(
        self,
        name: str,
        kv_caches: dict[str, torch.Tensor],
        num_pages: int,
        layout: dict[str, int | str],
        timeout: float,
    ) -> None:
        caches = list({cache.data_ptr(): cache for cache in kv_caches.values()}.values())
        self.strides = np.array([bytes_per_page(cache, num_pages) for cache in caches], dtype=np.int64)
        self.bases = np.array([cache.data_ptr() for cache in caches], dtype=np.int64)
        self.memory = "DRAM" if caches[0].device.type == "cpu" else "VRAM"
        self.device = max(caches[0].get_device(), 0)
        self.page_bytes = int(self.strides.sum())
        self.layout = layout | {"layers": len(caches), "page_bytes": self.page_bytes}
        self.timeout = timeout
        self.agent = make_agent(name)
        regions = [
            (int(base), int(stride) * num_pages, self.device, "")
            for base, stride in zip(self.bases, self.strides, strict=True)
        ]
        self.registered = self.agent.register_memory(regions, self.memory)
        self.holds = Holds(self.agent)
        self.connected: dict[str, str] = {}  # agents by name, as NIXL calls them
        self.waves: dict[str, int] = {}  # pages that arrive in WAVE_SECONDS as far as is known, by agent
        self.stuck: list[StuckRead] = []
        self._stuck_pages: list[int] = []
        self._freed_pages: list[int] = []

    def address(self) -> dict[str, Any]:
        """Return what another worker needs to read these pages, as msgpack takes it."""
        return {
            "name": self.agent.name,
            "metadata": self.agent.get_agent_metadata(),
            "bases": self.bases.tolist(),
            "device": self.device,
            "holds": self.holds.address,
            "layout": self.layout,
        }

    def begin(
        self,
        transfer: Transfer,
        address: dict[str, Any],
        hold: int,
        remote_page_ids: Sequence[int],
        local_page_ids: Sequence[int],
    ) -> None:
        """Begin to copy another worker's pages over pages of this one, as a read of ``transfer``.

        Args:
            hold: the number under which the other worker's replica holds them.

        Raises:
            TransferError: the other worker has another layout, or can't be reached, or may have released the pages.
        """
        reason = layout_mismatch(self.layout, address["layout"])
        if reason is not None:
            raise TransferError(reason)
        first_wave = max(FIRST_WAVE_BYTES // self.page_bytes, 1, self.waves.get(address["name"], 0))
        read = SourceRead(address, hold, remote_page_ids, local_page_ids, first_wave)
        transfer.reads.append(read)
        transfer.num_bytes += len(local_page_ids) * self.page_bytes
        self._begin_read(read, self._wave)

    def is_done(self, transfer: Transfer) -> bool:
        """Return whether all pages have arrived, and were held until then.

        To be called again and again: begins what comes next in each read.

        Raises:
            TransferError: a read has failed, or a wave has timed out, or the source has released the pages.
        """
        for read in list(transfer.reads):
            try:
                state = self.agent.check_xfer_state(read.handle)
            except Exception as error:
                raise TransferError(f"reading from {read.name} failed: {error!r}") from error
            if state == "ERR":
                raise TransferError(f"reading from {read.name} failed")
            seconds = time.monotonic() - read.started
            if seconds > self.timeout:  # over TCP, NIXL may never report a link that is cut
                # A wave that has ended late does not count: if this process has hung, the front has timed out too.
                raise TransferError(f"no page has arrived from {read.name} for {self.timeout:g} s")
            if state == "DONE":
                if read.answer is None:
                    self._note_wave(read, seconds)
                read.num_arrived = read.num_begun
                was_held = read.answer is None or self.holds.was_held(read.answer, read.hold)
                self._release_handle(read)
                if not was_held:
                    raise TransferError(f"{read.name} had released the pages before they arrived")
                if read.answer is not None:
                    transfer.reads.remove(read)
                elif read.num_begun == len(read.local_page_ids):
                    self._begin_read(read, self._answer)
                else:
                    self._begin_read(read, self._wave)
        return not transfer.reads

    def _note_wave(self, read: SourceRead, seconds: float) -> None:
        """Let the waves of the link follow one that has arrived. A quick one of few pages says nothing of more."""
        found = next_wave(read.num_begun - read.num_arrived, seconds)
        read.wave = found if seconds > WAVE_SECONDS else max(found, read.wave)
        self.waves[read.name] = read.wave

    def _begin_read(self, read: SourceRead, descriptors: Callable[[SourceRead], tuple[Any, Any]]) -> None:
        """Begin to read what ``descriptors`` returns: NIXL's lists, local and remote (raises TransferError)."""
        read.started = time.monotonic()
        try:
            if read.name not in self.connected:
                self.connected[read.name] = self.agent.add_remote_agent(read.address["metadata"])
            read.handle = self.agent.initialize_xfer("READ", *descriptors(read), read.name)
            state = self.agent.transfer(read.handle)
        except Exception as error:  # NIXL's own exceptions have no common class
            raise TransferError(f"NIXL can't read from {read.name}: {error!r}") from error
        if state == "ERR":
            raise TransferError(f"NIXL refused to read from {read.name}")

    def cancel(self, transfer: Transfer) -> None:
        """Close the connections of a failed transfer. No late byte may arrive in pages that other requests own.

        Where NIXL does not end a read, its pages are stuck (``take_stuck_pages``).
        """
        for read in transfer.reads:
            self.waves.pop(read.name, None)
            if self._release_handle(read):  # else its connection is in use
                self._disconnect(read.name)
        transfer.reads.clear()

    def _disconnect(self, name: str) -> None:
        try:
            self.waves.pop(name, None)
            if self.connected.pop(name, None) is not None:
                self.agent.remove_remote_agent(name)
        except Exception:
            logger.exception("the connection to %s can't be closed", name)

    def _release_handle(self, read: SourceRead) -> bool:
        """Release the handle of what is under way; returns whether NIXL has done so. It is tried again otherwise."""
        handle, read.handle = read.handle, None
        if handle is None:
            return True
        if self._try_release(read.name, handle):
            self.holds.free_answer(read.answer)
            return True
        page_ids = list(read.local_page_ids[read.num_arrived : read.num_begun])
        self.stuck.append(StuckRead(read.name, handle, page_ids, read.answer))
        self._stuck_pages += page_ids
        return False

    def _try_release(self, source: str, handle: Any) -> bool:
        try:
            self.agent.release_xfer_handle(handle)
        except Exception as error:  # NIXL's own exceptions have no common class
            logger.error("the read from %s can't be ended: %r", source, error)
            return False
        return True

    def retry_releases(self) -> None:
        """Try once more to release the handles of stuck reads. To be called at each step."""
        for read in list(self.stuck):
            if self._try_release(read.source, read.handle):
                self.stuck.remove(read)
                self._freed_pages += read.page_ids
                self.holds.free_answer(read.answer)

    def take_stuck_pages(self) -> tuple[list[int], list[int]]:
        """(pages that are stuck, pages that no longer are) since the last call; a page once for each read."""
        changes = self._stuck_pages, self._freed_pages
        self._stuck_pages, self._freed_pages = [], []
        return changes

    def close(self) -> None:
        self.agent.deregister_memory(self.registered)
        self.holds.close()

    def _answer(self, read: SourceRead) -> tuple[Any, Any]:
        """NIXL's lists for the answer whether the source still holds the pages."""
        read.answer = self.holds.new_answer()
        return self.holds.descriptors(read.answer, read.address["holds"], read.hold)

    def _wave(self, read: SourceRead) -> tuple[Any, Any]:
        """NIXL's lists for the next wave."""
        wave = slice(read.num_begun, read.num_begun + read.wave)
        read.num_begun = min(wave.stop, len(read.local_page_ids))
        return self._descriptors(read.address, read.remote_page_ids[wave], read.local_page_ids[wave])

    def _descriptors(
        self, address: dict[str, Any], remote_page_ids: Sequence[int], local_page_ids: Sequence[int]
    ) -> tuple[Any, Any]:
        """NIXL's lists of (address, bytes, device), local and remote: one entry for each layer and run of pages."""
        remote_first, local_first, count = consecutive(remote_page_ids, local_page_ids)
        remote_bases = np.array(address["bases"], dtype=np.int64)
        local = memory_ranges(self.bases, self.strides, local_first, count, self.device)
        remote = memory_ranges(remote_bases, self.strides, remote_first, count, address["device"])
        return self.agent.get_xfer_descs(local, self.memory), self.agent.get_xfer_descs(remote, self.memory)


def next_wave(num_pages: int, seconds: float) -> int:
    """Return the pages that arrive in WAVE_SECONDS at the rate of a wave of ``num_pages`` that took ``seconds``.

    At least 1, and at most MAX_GROWTH times ``num_pages``.
    """
    return max(round(num_pages * WAVE_SECONDS / max(seconds, WAVE_SECONDS / MAX_GROWTH)), 1)


def bytes_per_page(cache: torch.Tensor, num_pages: int) -> int:
    """Bytes from one page to the next in a layer's KV cache.

    A page is one piece of memory, in whatever order its dimensions are: H, N, C in vLLM's layout LBHNC, N, H, C in
    LBNHC. Both ends must have the same order, which ``PageReader`` finds in ``layout``.

    Raises:
        TransferError: a page is not in one piece.
    """
    kernel_pages, rest = divmod(cache.shape[0], num_pages)
    if rest or not is_dense(cache[0]) or cache.stride(0) != cache[0].numel():
        shape, strides = tuple(cache.shape), cache.stride()
        raise TransferError(
            f"a KV cache of shape {shape}, strides {strides} does not hold {num_pages} pages in one piece each: leave "
            "VLLM_KV_CACHE_LAYOUT unset, or set it to LBHNC or LBNHC"
        )
    return kernel_pages * cache.stride(0) * cache.element_size()


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor takes one piece of memory without gaps, in any order of its dimensions."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def consecutive(remote: Sequence[int], local: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find runs of page ids that are consecutive on both sides.

    Returns:
        The first remote page, the first local page and the number of pages: [runs] int64 each.
    """
    page_ids = np.array([remote, local], dtype=np.int64)
    starts = np.flatnonzero((np.diff(page_ids, prepend=-2) != 1).any(axis=0))
    first_remote, first_local = page_ids[:, starts]
    return first_remote, first_local, np.diff(starts, append=page_ids.shape[1])


def memory_ranges(
    bases: np.ndarray, strides: np.ndarray, first: np.ndarray, count: np.ndarray, device: int
) -> np.ndarray:
    """Return the memory of runs of pages as an array for NIXL; a long list of tuples would delay the worker.

    Args:
        bases: [layers] int64, the address of each layer's KV cache.
        strides: [layers] int64, bytes of a page.
        first: [runs] int64, the first page of each run.
        count: [runs] int64, its pages.

    Returns:
        [runs * layers, 3] uint64: address, bytes, device.
    """
    ranges = np.empty((len(first), len(bases), 3), dtype=np.uint64)
    ranges[..., 0] = bases + first[:, None] * strides
    ranges[..., 1] = count[:, None] * strides
    ranges[..., 2] = device
    return ranges.reshape(-1, 3)


def layout_mismatch(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Why pages can't be copied between two layouts, with the values of both; None where they can."""
    differing = differences(ours, theirs)
    return f"KV pages have another layout: {differing}" if differing else None


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return the entries that differ, with the values of both sides; empty if none does."""
    return "; ".join(
        f"{name} {ours.get(name)!r} here, {theirs.get(name)!r} there"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    )
