"""Attention over KV pages that this worker holds, for the replicas that run the prompts of these pages.

It runs in a thread beside the engine's steps: held pages do not change, and torch releases the GIL while it computes.
The thread sleeps once no shard is open and no message has arrived for a while. Until then it responds to queries of
closed shards with an error.
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

from attention_backends.kernels.contract import Layout, Operands
from attention_backends.kernels.cpu.attention import paged_attention
from replicas.messages import Message, MessageError, Messenger

logger = init_logger("vllm.starling")

BUSY_SECONDS = 0.002
"""For this long after a message the thread looks for the next one without sleeping: a step's layers follow fast."""

NAP_SECONDS = 0.0005

LINGER_SECONDS = 30.0
"""For this long after a message the thread looks for the next one although no shard is open."""


class RemoteAttentionServer:
    """The open shards of one worker.

    Args:
        name: unique among all workers.
        kv_caches: layer -> its KV cache as vLLM's CPU attention has it, (pages, KV heads, page size, K and V).
    """

    def __init__(self, name: str, kv_caches: dict[str, torch.Tensor]) -> None:
        self.kv_caches = kv_caches
        self.messenger = Messenger(name)
        self.shards: dict[str, np.ndarray] = {}
        self.lock = threading.Lock()  # held while pages are read
        self.has_work = threading.Event()
        self.stopped = False
        self.thread = threading.Thread(target=self._serve, name="starling-remote-attention", daemon=True)
        self.thread.start()

    def open(self, name: str, page_ids: Sequence[int]) -> dict[str, Any]:
        """Respond to queries of these pages from now on; returns the address that takes queries."""
        with self.lock:
            self.shards[name] = np.asarray(page_ids, dtype=np.int32)
        self.has_work.set()
        return self.messenger.address

    def close(self, names: Iterable[str]) -> None:
        """No page of these shards is read any more when this returns."""
        with self.lock:
            for name in names:
                self.shards.pop(name, None)

    def stop(self) -> None:
        """End the thread."""
        self.stopped = True
        self.has_work.set()
        self.thread.join()

    def _serve(self) -> None:
        last = time.monotonic()
        while True:
            self.has_work.wait()
            if self.stopped:
                return
            messages = self.messenger.receive()
            for message in messages:
                self._respond(message)
            if messages:
                last = time.monotonic()
            elif (idle := time.monotonic() - last) < BUSY_SECONDS:
                os.sched_yield()
            elif not self._suspend(idle):
                time.sleep(NAP_SECONDS)

    def _suspend(self, idle: float) -> bool:
        """Let the thread sleep until a shard is opened, if it may; returns whether it will.

        Args:
            idle: seconds since the last message.
        """
        if self.shards or idle < LINGER_SECONDS:
            return False
        with self.lock:
            if not self.shards and not self.stopped:
                self.has_work.clear()
        return not self.has_work.is_set()

    def _respond(self, message: Message) -> None:
        try:
            if "hello" in message.header:
                if not self.messenger.is_connected(message.sender):
                    self.messenger.connect(message.header["hello"])
                return
            body, response = b"", {"id": message.header["id"]}
            try:
                body = self._attend(message.header, message.body)
            except Exception as error:  # whatever the error is, the client must not wait for its timeout
                logger.exception("a shard can't be attended to")
                response["error"] = str(error)
            self.messenger.send(message.sender, response, body)
        except MessageError as error:  # the client's timeout handles it
            logger.error("remote attention: %s", error)

    def _attend(self, header: dict[str, Any], body: bytearray) -> bytes:
        """The body of the response to a query: out (T, heads, head size) in the query's dtype, lse (T, heads) float32.

        Raises:
            ValueError: a shard of the query is not open.
        """
        cache = self.kv_caches[header["layer"]]
        query = torch.frombuffer(body, dtype=getattr(torch, header["dtype"])).view(-1, header["heads"], header["size"])
        with self.lock:
            page_ids = []
            for name, _, first, num_pages in header["spans"]:
                if name not in self.shards:
                    raise ValueError(f"shard {name} is not open here")
                page_ids.append(self.shards[name][first : first + num_pages])
            out, lse = attend_all(query, cache, page_ids, [span[1] for span in header["spans"]], header)
        return to_bytes(out) + to_bytes(lse)


def attend_all(
    query: torch.Tensor,
    cache: torch.Tensor,
    page_ids: Sequence[np.ndarray],
    num_queries: Sequence[int],
    params: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of consecutive query tokens over all keys of whole pages, without a causal mask.

    Args:
        query: (T, heads, head size).
        cache: (pages, KV heads, page size, K and V).
        page_ids: for each span of queries, the pages that it attends to.
        num_queries: tokens of each span; they add up to T.
        params: ``scale`` and ``softcap`` of the layer.

    Returns:
        out (T, heads, head size), lse (T, heads).
    """
    num_pages, kv_heads, page_size, _ = cache.shape
    keys, values = cache.view(num_pages, kv_heads, 2 * page_size, -1).chunk(2, dim=2)
    block_table = torch.zeros(len(page_ids), max(map(len, page_ids)), dtype=torch.int32)
    for row, of_row in enumerate(page_ids):
        block_table[row, : len(of_row)] = torch.from_numpy(of_row)
    operands = Operands(
        query,
        keys,
        values,
        block_table,
        torch.from_numpy(np.concatenate(([0], np.cumsum(num_queries))).astype(np.int32)),
        torch.tensor([len(of_row) * page_size for of_row in page_ids], dtype=torch.int32),
        scale=params["scale"],
        softcap=params["softcap"],
        causal=False,
        layout=Layout.CPU,
    )
    return paged_attention(operands)


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The memory of a CPU tensor, contiguous."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
