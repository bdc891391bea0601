"""Moves whole KV pages between engine processes with NIXL, the library vLLM itself uses: shared memory on one host,
TCP or RDMA between hosts, as UCX finds.

A page here is the scheduler's: a kernel may cut it into several of its own, which lie one after the other. NIXL says of
a transfer when it is done, not how far it is, and a prompt's pages may be 100 GB on a slow wire: they are read in waves
of some seconds each, so that a wire that is slow can be told from one that is cut.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from scheduler.silence import silence_seconds

logger = init_logger("vllm.starling")

PROGRESS_MICROSECONDS = 1000

FIRST_WAVE_BYTES = 64 * 2**20
WAVE_SECONDS = 2.0
"""How long later waves are meant to take: longer than an engine's step, at whose end the next one begins."""

MOST_GROWTH = 8


class MoveError(Exception):
    """Pages can't be moved; says why."""


@dataclass
class Read:
    """Pages of one source: those that have come, a wave under way, and the rest."""

    address: dict[str, Any]
    theirs: Sequence[int]
    ours: Sequence[int]
    wave: int  # pages
    begun: int = 0  # pages that have come, or are under way
    handle: Any = None
    started: float = 0.0

    @property
    def name(self) -> str:
        name: str = self.address["name"]
        return name


class Move:
    """Reads under way for one request, one for each source."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.bytes = 0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class PageMover:
    """The pages of one worker, readable by others, and reads of theirs.

    Args:
        name: unique among all workers.
        kv_caches: layer -> its cache, whose first dimension counts kernel pages.
        num_pages: pages of the scheduler.
        layout: what must be equal for pages to be copied as they are; values are numbers and strings.

    Raises:
        MoveError: a page does not lie in one piece in each layer.
    """

    def __init__(
        self, name: str, kv_caches: dict[str, torch.Tensor], num_pages: int, layout: dict[str, int | str]
    ) -> None:
        caches = list({cache.data_ptr(): cache for cache in kv_caches.values()}.values())
        self.strides = np.array([page_bytes(cache, num_pages) for cache in caches], dtype=np.int64)
        self.bases = np.array([cache.data_ptr() for cache in caches], dtype=np.int64)
        self.memory = "DRAM" if caches[0].device.type == "cpu" else "VRAM"
        self.device = max(caches[0].get_device(), 0)
        self.layout = layout | {"layers": len(caches), "page_bytes": int(self.strides.sum())}
        self.agent = make_agent(name)
        regions = [
            (int(base), int(stride) * num_pages, self.device, "")
            for base, stride in zip(self.bases, self.strides, strict=True)
        ]
        self.registered = self.agent.register_memory(regions, self.memory)
        self.peers: dict[str, str] = {}
        self.silence = silence_seconds()

    def address(self) -> dict[str, Any]:
        """What another worker needs to read these pages; msgpack takes it."""
        return {
            "name": self.agent.name,
            "metadata": self.agent.get_agent_metadata(),
            "bases": self.bases.tolist(),
            "device": self.device,
            "layout": self.layout,
        }

    def read(self, move: Move, address: dict[str, Any], theirs: Sequence[int], ours: Sequence[int]) -> None:
        """Begin to copy their pages over ours.

        Raises:
            MoveError: their layout is another one, or they can't be reached.
        """
        reason = mismatch(self.layout, address["layout"])
        if reason is not None:
            raise MoveError(reason)
        page_bytes = int(self.strides.sum())
        read = Read(address, theirs, ours, max(FIRST_WAVE_BYTES // page_bytes, 1))
        move.reads.append(read)
        move.bytes += len(ours) * page_bytes
        self._begin_wave(read)

    def done(self, move: Move) -> bool:
        """Whether all of it has arrived, the next waves begun where it has not (raises MoveError: it never will)."""
        for read in list(move.reads):
            try:
                state = self.agent.check_xfer_state(read.handle)
            except Exception as error:
                raise MoveError(f"reading from {read.name} failed: {error!r}") from error
            if state == "ERR":
                raise MoveError(f"reading from {read.name} failed")
            seconds = time.monotonic() - read.started
            if state == "DONE":
                self.agent.release_xfer_handle(read.handle)
                read.handle = None
                if read.begun == len(read.ours):
                    move.reads.remove(read)
                else:
                    read.wave = next_wave(read.wave, seconds)
                    self._begin_wave(read)
            elif seconds > self.silence:  # over TCP a link that is cut may never report it
                raise MoveError(f"nothing has come from {read.name} for {self.silence:g} s")
        return not move.reads

    def _begin_wave(self, read: Read) -> None:
        """Ask for the next pages (raises MoveError: they can't be had)."""
        begin, read.begun = read.begun, min(read.begun + read.wave, len(read.ours))
        read.started = time.monotonic()
        try:
            if read.name not in self.peers:
                self.peers[read.name] = self.agent.add_remote_agent(read.address["metadata"])
            theirs, ours = read.theirs[begin : read.begun], read.ours[begin : read.begun]
            local, remote = self._descriptors(read.address, theirs, ours)
            read.handle = self.agent.initialize_xfer("READ", local, remote, read.name)
            state = self.agent.transfer(read.handle)
        except Exception as error:  # NIXL's own exceptions have no common class
            raise MoveError(f"NIXL can't read from {read.name}: {error!r}") from error
        if state == "ERR":
            raise MoveError(f"NIXL refused to read from {read.name}")

    def give_up(self, move: Move) -> None:
        """Cut the connections of a failed move, so that nothing arrives late in pages that have gone to others."""
        for read in move.reads:
            try:
                if read.handle is not None:
                    self.agent.release_xfer_handle(read.handle)
                if self.peers.pop(read.name, None) is not None:
                    self.agent.remove_remote_agent(read.name)
            except Exception:
                logger.exception("the connection to %s can't be closed", read.name)
        move.reads.clear()

    def close(self) -> None:
        self.agent.deregister_memory(self.registered)

    def _descriptors(self, address: dict[str, Any], theirs: Sequence[int], ours: Sequence[int]) -> tuple[Any, Any]:
        """NIXL's lists of (address, bytes, device), ours and theirs, one entry a layer and run of pages."""
        bases, device = np.array(address["bases"], dtype=np.int64), address["device"]
        local: list[tuple[int, int, int]] = []
        remote: list[tuple[int, int, int]] = []
        for their_first, our_first, count in consecutive(theirs, ours):
            for ours_at, theirs_at, stride in zip(self.bases, bases, self.strides, strict=True):
                local.append((int(ours_at + our_first * stride), int(count * stride), self.device))
                remote.append((int(theirs_at + their_first * stride), int(count * stride), device))
        return self.agent.get_xfer_descs(local, self.memory), self.agent.get_xfer_descs(remote, self.memory)


def make_agent(name: str) -> Any:
    """A NIXL agent whose thread looks for work every millisecond.

    As NIXL's Python makes it the thread never sleeps: an idle replica then takes a core from one that computes. The
    constructor sets the delay to 0 and hands it on to the binding, where it is changed. Goes when nixl_agent_config
    takes it.
    """
    from nixl._api import nixl_agent, nixl_agent_config

    binding = sys.modules[nixl_agent.__module__].nixlBind
    original = binding.nixlAgent

    def with_delay(name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_MICROSECONDS
        return original(name, config)

    binding.nixlAgent = with_delay
    try:
        return nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    finally:
        binding.nixlAgent = original


def next_wave(pages: int, seconds: float) -> int:
    """As many pages as come in WAVE_SECONDS, at the rate of the wave before."""
    return max(round(pages * WAVE_SECONDS / max(seconds, WAVE_SECONDS / MOST_GROWTH)), 1)


def page_bytes(cache: torch.Tensor, num_pages: int) -> int:
    """Bytes from one page to the next in a layer's cache (raises MoveError: they are not one piece)."""
    kernel_pages, rest = divmod(cache.shape[0], num_pages)
    if rest or not cache[0].is_contiguous() or cache.stride(0) != cache[0].numel():
        shape, strides = tuple(cache.shape), cache.stride()
        raise MoveError(
            f"a KV cache of shape {shape}, strides {strides} does not hold {num_pages} pages in one piece each"
        )
    return kernel_pages * cache.stride(0) * cache.element_size()


def consecutive(theirs: Sequence[int], ours: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Pairs of pages as (their first, our first, count), merged where both sides go on with the next one."""
    start = 0
    for index in range(1, len(ours) + 1):
        if index == len(ours) or (theirs[index], ours[index]) != (theirs[index - 1] + 1, ours[index - 1] + 1):
            yield theirs[start], ours[start], index - start
            start = index


def mismatch(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Why pages can't be copied between two layouts, with both sides' values; None where they can."""
    differing = [
        f"{name} {ours.get(name)!r} here, {theirs.get(name)!r} there"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    return f"KV pages have another layout: {'; '.join(differing)}" if differing else None
