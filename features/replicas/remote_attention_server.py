"""Attention over KV pages that this worker holds, for the replicas that run the prompts of these pages.

It runs in a thread beside the engine's steps: held pages do not change, and torch releases the GIL while it computes.
The thread sleeps once no shard is open and no message has arrived for a while. Until then it responds to queries of
closed shards with an error.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from starling.attention_backends.kernels.contract import NO_ROTATION, Layout, Rotation
from starling.attention_backends.star.rerotated_rows import add_rows, make_rerotated_rows
from starling.attention_backends.star.rows import RerotatedKeys
from starling.features.replicas.notifications import Message, MessageError, MessageLimits, Messenger
from starling.features.replicas.remote_query import Query, QueryError, Span, parse_query

logger = init_logger("vllm.starling")

BUSY_SECONDS = 0.002
"""For this long after a message the thread looks for the next one without sleeping: a step's layers follow fast."""

NAP_SECONDS = 0.0005

Rotations = Callable[[], Mapping[str, Rotation]]

LINGER_SECONDS = 30.0
"""For this long after a message the thread looks for the next one although no shard is open."""


class RemoteAttentionServer:
    """The open shards of one worker.

    Args:
        name: unique among all workers.
        kv_caches: layer -> its KV cache as vLLM's CPU attention has it, (pages, KV heads, page size, K and V).
        rotations: returns layer -> its rotary embedding, for queries that are rerotated.
        limits: of the messages that it receives.

    Attributes:
        failure: why the thread has ended; None while it runs.
    """

    def __init__(
        self, name: str, kv_caches: dict[str, torch.Tensor], rotations: Rotations, limits: MessageLimits
    ) -> None:
        self.kv_caches, self.rotations = kv_caches, rotations
        self.messenger = Messenger(name, limits)
        self.failure: str | None = None
        self.shards: dict[str, np.ndarray] = {}
        self.lock = threading.Lock()  # held while pages are read
        self.has_work = threading.Event()
        self.stopped = False
        self.thread = threading.Thread(target=self._serve, name="starling-remote-attention", daemon=True)
        self.thread.start()

    def open(self, name: str, page_ids: Sequence[int]) -> dict[str, Any]:
        """Respond to queries of these pages from now on; returns the address that takes queries.

        Raises:
            RuntimeError: the thread has ended, so that no query would get a response.
        """
        with self.lock:
            if self.failure is not None:
                raise RuntimeError(f"this replica can't hold KV for other ones any more: {self.failure}")
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
        try:
            self._serve_until_stopped()
        except Exception as error:
            logger.exception("remote attention has failed: this replica holds no more KV for other ones")
            with self.lock:
                self.failure = repr(error)
                self.shards.clear()
            self._tell_clients(f"its remote attention has failed: {error!r}")

    def _tell_clients(self, failure: str) -> None:
        """Answer clients that wait for the response to a query, if they can still be reached."""
        for name in self.messenger.connected:
            try:
                self.messenger.send(name, {"failed": failure})
            except MessageError as error:  # the client's timeout handles it
                logger.error("remote attention: %s", error)

    def _serve_until_stopped(self) -> None:
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
        """Respond to a query; a message that is none is logged, and gets no response."""
        try:
            if "hello" in message.header:
                self._connect(message)
                return
            query = parse_query(message)
            body = b""
            response: dict[str, Any] = {"id": query.id}
            try:
                body = self._attend(query, message.body)
            except Exception as error:  # whatever the error is, the client must not wait for its timeout
                logger.exception("a shard can't be attended to")
                response["error"] = str(error)
            self.messenger.send(message.sender, response, body)
        except (MessageError, QueryError) as error:  # the client's timeout handles it
            logger.error("remote attention: a message of %r: %s", message.sender, error)

    def _connect(self, message: Message) -> None:
        """Connect to a client by the address in its first message.

        Raises:
            MessageError: NIXL can't reach it.
            QueryError: there is no address of that client.
        """
        address = message.header["hello"]
        if not isinstance(address, dict) or address.get("name") != message.sender or "metadata" not in address:
            raise QueryError("its address is not the sender's")
        if not self.messenger.is_connected(message.sender):
            self.messenger.connect(address)

    def _attend(self, query: Query, body: bytearray) -> bytes:
        """Attend to a query; return the response: out (T, heads, head size) in its dtype, lse (T, heads) float32.

        Raises:
            QueryError: a shard of the query is not open, or the query does not fit the layer.
        """
        cache = self.kv_caches.get(query.layer)
        if cache is None:
            raise QueryError(f"there is no layer {query.layer} here")
        tokens = query.tokens(body, cache)
        rotation = self._rotation(query)
        with self.lock:
            page_ids = [self._pages(span, cache.shape[2]) for span in query.spans]
            params = {"scale": query.scale, "softcap": query.softcap}
            out, lse = attend_spans(tokens, cache, query.spans, page_ids, rotation, **params)
        return to_bytes(out) + to_bytes(lse)

    def _rotation(self, query: Query) -> Rotation:
        """Return the rotation of the query tokens.

        Raises:
            QueryError: they can't be re-rotated so far.
        """
        furthest = max((by for span in query.spans for by in span.rotate_by), default=0)
        if furthest == 0:
            return NO_ROTATION
        rotation = self.rotations().get(query.layer)
        if rotation is None or furthest >= len(rotation.cos):
            raise QueryError(f"queries of layer {query.layer} can't be re-rotated by {furthest} positions")
        return rotation

    def _pages(self, span: Span, page_size: int) -> np.ndarray:
        """Return the pages of a span's shard, which has all of the span's keys."""
        if span.shard not in self.shards:
            raise QueryError(f"shard {span.shard} is not open here")
        page_ids = self.shards[span.shard]
        if not len(span.first_pages) == len(span.num_keys) == len(span.rotate_by) > 0:
            raise QueryError(f"a span of shard {span.shard} does not have three numbers for each range")
        for first, keys, rotate_by in zip(span.first_pages, span.num_keys, span.rotate_by, strict=True):
            if first < 0 or keys < 1 or rotate_by < 0 or first + -(-keys // page_size) > len(page_ids):
                raise QueryError(
                    f"shard {span.shard} has {len(page_ids)} pages, and not {keys} keys from page {first} on, "
                    f"rotated back by {rotate_by} positions"
                )
        return page_ids


def attend_spans(
    query: torch.Tensor,
    cache: torch.Tensor,
    spans: Sequence[Span],
    page_ids: Sequence[np.ndarray],
    rotation: Rotation,
    **params: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of query tokens over all keys of their spans, without a causal mask.

    Args:
        query: (T, heads, head size).
        cache: (pages, KV heads, page size, K and V).
        page_ids: for each span, the pages of its shard.
        params: ``scale`` and ``softcap`` of the layer.

    Returns:
        out (T, heads, head size) in the query's dtype, lse (T, heads) float32; 0 and -inf for a token without a span.
    """
    out, lse = torch.zeros(query.shape), torch.full(query.shape[:2], float("-inf"))
    if not spans:
        return out.to(query.dtype), lse
    num_pages, kv_heads, page_size, _ = cache.shape
    keys, values = cache.view(num_pages, kv_heads, 2 * page_size, -1).chunk(2, dim=2)
    block_table = torch.zeros(len(spans), max(map(len, page_ids)), dtype=torch.int32)
    for row, of_row in enumerate(page_ids):
        block_table[row, : len(of_row)] = torch.from_numpy(of_row)
    rows = np.repeat(np.arange(len(spans)), [len(span.rotate_by) for span in spans])
    ranges = (
        np.concatenate([getattr(span, name) for span in spans]) for name in ("first_pages", "num_keys", "rotate_by")
    )
    starts, query_lens = np.asarray([(span.first_query, span.num_queries) for span in spans]).T
    calls = make_rerotated_rows(RerotatedKeys(rows, rows, *ranges), starts, query_lens, block_table, page_size)
    add_rows(calls, rotation, query, (keys, values), out, lse, layout=Layout.CPU, **params)
    return out.to(query.dtype), lse


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a CPU tensor, contiguous."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
