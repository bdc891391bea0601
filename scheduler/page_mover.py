"""Moves whole KV pages between engine processes with NIXL, the library vLLM itself uses: shared memory on one host,
TCP or RDMA between hosts, as UCX finds.

A page here is the scheduler's: a kernel may cut it into several of its own, which lie one after the other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

logger = init_logger("vllm.starling")

PROGRESS_MICROSECONDS = 1000

SECONDS_WITHOUT_END = 30.0
"""After so long without an end a transfer is given up: over TCP a link that is cut may never report it."""


class MoveError(Exception):
    """Pages can't be moved; says why."""


class Move:
    """Reads under way for one request, one for each source."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, Any]] = []  # agent name, NIXL handle
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
        name = address["name"]
        try:
            if name not in self.peers:
                self.peers[name] = self.agent.add_remote_agent(address["metadata"])
            local, remote = self._descriptors(address, theirs, ours)
            handle = self.agent.initialize_xfer("READ", local, remote, name)
            move.reads.append((name, handle))
            move.bytes += len(ours) * int(self.strides.sum())
            if self.agent.transfer(handle) == "ERR":
                raise MoveError(f"NIXL refused to read from {name}")
        except MoveError:
            raise
        except Exception as error:  # NIXL's own exceptions have no common class
            raise MoveError(f"NIXL can't read from {name}: {error!r}") from error

    def done(self, move: Move) -> bool:
        """Whether all of it has arrived (raises MoveError: it never will)."""
        for name, handle in list(move.reads):
            try:
                state = self.agent.check_xfer_state(handle)
            except Exception as error:
                raise MoveError(f"reading from {name} failed: {error!r}") from error
            if state == "ERR":
                raise MoveError(f"reading from {name} failed")
            if state == "DONE":
                self.agent.release_xfer_handle(handle)
                move.reads.remove((name, handle))
        if move.reads and move.seconds > SECONDS_WITHOUT_END:
            names = ", ".join(name for name, _ in move.reads)
            raise MoveError(f"reading from {names} took more than {SECONDS_WITHOUT_END:.0f} s")
        return not move.reads

    def give_up(self, move: Move) -> None:
        """Cut the connections of a failed move, so that nothing arrives late in pages that have gone to others."""
        for name, handle in move.reads:
            try:
                self.agent.release_xfer_handle(handle)
                if self.peers.pop(name, None) is not None:
                    self.agent.remove_remote_agent(name)
            except Exception:
                logger.exception("the connection to %s can't be closed", name)
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
