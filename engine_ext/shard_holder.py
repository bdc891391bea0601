"""Attention over KV pages that this worker holds, for the replicas that run the prompts they belong to.

In a thread beside the engine's steps: held pages do not change, and torch leaves Python's lock while it computes. The
thread sleeps while no shard is open, and none has been for a while: who asks for one that was closed is told so.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from attention_backends.kernels.contract import Layout
from attention_backends.kernels.cpu import paged_attention
from scheduler.messenger import Message, MessageError, Messenger

logger = init_logger("vllm.starling")

BUSY_SECONDS = 0.002
"""For so long after a message the thread looks for the next one without sleeping: the layers of a step follow fast."""

NAP_SECONDS = 0.0005

LINGER_SECONDS = 30.0
"""How long after the last message it goes on looking for one where no shard is open."""


class ShardHolder:
    """The open shards of one worker.

    Args:
        name: unique among all workers.
        caches: layer -> its KV cache, as vLLM's CPU attention gets it: (pages, KV heads, page, K and V).
    """

    def __init__(self, name: str, caches: dict[str, torch.Tensor]) -> None:
        self.caches = caches
        self.messenger = Messenger(name)
        self.shards: dict[str, np.ndarray] = {}
        self.lock = threading.Lock()
        self.work = threading.Event()
        self.stopped = False
        self.thread = threading.Thread(target=self._serve, name="starling-shards", daemon=True)
        self.thread.start()

    def open(self, name: str, pages: Sequence[int]) -> dict[str, Any]:
        """Answer for these pages from now on; returns where to ask."""
        with self.lock:
            self.shards[name] = np.asarray(pages, dtype=np.int32)
        self.work.set()
        return self.messenger.address

    def close(self, names: Iterable[str]) -> None:
        """No page of these is read any more once this returns."""
        with self.lock:
            for name in names:
                self.shards.pop(name, None)

    def stop(self) -> None:
        self.stopped = True
        self.work.set()
        self.thread.join()

    def _serve(self) -> None:
        last = time.monotonic()
        while True:
            self.work.wait()
            if self.stopped:
                return
            messages = self.messenger.receive()
            for message in messages:
                self._answer(message)
            if messages:
                last = time.monotonic()
            elif (idle := time.monotonic() - last) < BUSY_SECONDS:
                os.sched_yield()
            elif not self._sleeps(idle):
                time.sleep(NAP_SECONDS)

    def _sleeps(self, idle: float) -> bool:
        """Whether the thread has nothing to look for until a shard is opened."""
        if self.shards or idle < LINGER_SECONDS:
            return False
        with self.lock:
            if not self.shards and not self.stopped:
                self.work.clear()
        return not self.work.is_set()

    def _answer(self, message: Message) -> None:
        try:
            if "hello" in message.header:
                if not self.messenger.knows(message.sender):
                    self.messenger.connect(message.header["hello"])
                return
            body, told = b"", {"id": message.header["id"]}
            try:
                body = self._attend(message.header, message.body)
            except Exception as error:  # whatever it is, the one who asked must not wait for it
                logger.exception("a shard can't be attended to")
                told["error"] = str(error)
            self.messenger.send(message.sender, told, body)
        except MessageError as error:  # the asker notices by itself
            logger.error("shards: %s", error)

    def _attend(self, header: dict[str, Any], body: bytearray) -> bytes:
        """The answer to an ask: out (T, heads, head size) in the query's dtype, then lse (T, heads) float32."""
        cache = self.caches[header["layer"]]
        query = torch.frombuffer(body, dtype=getattr(torch, header["dtype"])).view(-1, header["heads"], header["size"])
        with self.lock:
            tables = []
            for name, _, first, pages in header["spans"]:
                if name not in self.shards:
                    raise ValueError(f"shard {name} is not open here")
                tables.append(self.shards[name][first : first + pages])
            out, lse = attend_all(query, cache, tables, [span[1] for span in header["spans"]], header)
        return raw(out) + raw(lse)


def attend_all(
    query: torch.Tensor,
    cache: torch.Tensor,
    tables: Sequence[np.ndarray],
    queries: Sequence[int],
    numbers: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of consecutive query tokens over all keys of whole pages.

    Args:
        query: (T, heads, head size).
        tables: for each span of queries, the pages it sees.
        queries: tokens of each span; they add up to T.
        numbers: ``scale`` and ``softcap`` of the layer.
    """
    pages, kv_heads, page, _ = cache.shape
    keys, values = cache.view(pages, kv_heads, 2 * page, -1).chunk(2, dim=2)
    table = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
    for row, of_row in enumerate(tables):
        table[row, : len(of_row)] = torch.from_numpy(of_row)
    return paged_attention(
        query,
        keys,
        values,
        table,
        torch.from_numpy(np.concatenate(([0], np.cumsum(queries))).astype(np.int32)),
        torch.tensor([len(of_row) * page for of_row in tables], dtype=torch.int32),
        scale=numbers["scale"],
        softcap=numbers["softcap"],
        causal=False,
        layout=Layout.CPU,
    )


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
