"""Asks other replicas for the attention over their shards while a step runs, and merges what they answer.

A step can't fail for one of its requests alone, and an exception would end the engine. So where a replica does not
answer, the step goes on without it, and which requests are lost is told with the step's end: their tokens are thrown
away, and the pages they filled leave the prefix cache (scheduler/star_scheduler.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.logger import init_logger

from attention_backends.kernels.merge import merge
from attention_backends.star.shards import Ask
from engine_ext.shard_holder import raw
from scheduler.messenger import Message, MessageError, Messenger

logger = init_logger("vllm.starling")

ANSWER_SECONDS = 10.0
"""How long an answer may take, besides its arithmetic."""

LEAST_FLOPS = 1e9
"""What a replica computes a second at the least."""

SPIN_SECONDS = 0.0005
NAP_SECONDS = 0.00005


@dataclass
class LostRequests(KVConnectorWorkerMetadata):
    """Request id -> why a step could not attend to all its keys."""

    reasons: dict[str, str]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> LostRequests:
        assert isinstance(other, LostRequests)
        return LostRequests(other.reasons | self.reasons)


class ShardClient:
    """One worker's connections to those that hold shards.

    Args:
        name: unique among all workers.
        rank: its tensor-parallel rank; it asks the same rank of others.
        count: called with the bytes of a query and its answer.
    """

    def __init__(self, name: str, rank: int, page: int, count: Callable[[int], None]) -> None:
        self.messenger = Messenger(name)
        self.rank, self.page, self.count = rank, page, count
        self.asked = 0
        self.lost: dict[str, str] = {}

    def take_lost(self) -> LostRequests | None:
        lost, self.lost = self.lost, {}
        return LostRequests(lost) if lost else None

    def step(self, asks: Sequence[Ask]) -> StepShards:
        return StepShards(self, asks)

    def ask(self, ask: Ask, layer: str, query: torch.Tensor, scale: float, softcap: float) -> int:
        """Send a replica its query tokens, (T, heads, head size); returns the ask's number (raises MessageError)."""
        address = ask.addresses[self.rank]
        if not self.messenger.knows(address["name"]):
            self.messenger.connect(address)
            self.messenger.send(address["name"], {"hello": self.messenger.address})
        self.asked += 1
        header = {
            "id": self.asked,
            "layer": layer,
            "scale": scale,
            "softcap": softcap,
            "dtype": str(query.dtype).removeprefix("torch."),
            "heads": query.shape[1],
            "size": query.shape[2],
            "spans": [(span.shard, span.queries, span.first, span.pages) for span in ask.spans],
        }
        body = raw(query)
        self.messenger.send(address["name"], header, body)
        self.count(len(body))
        return self.asked

    def lose(self, ask: Ask, reason: str) -> None:
        """Note whom an ask without an answer was for, and cut the connection."""
        name = ask.addresses[self.rank]["name"]
        for span in ask.spans:
            if span.request_id not in self.lost:
                logger.error("%s: its KV in %s can't be attended to: %s", span.request_id, name, reason)
                self.lost[span.request_id] = reason
        try:
            self.messenger.forget(name)
        except MessageError as error:
            logger.error("shards: %s", error)


class StepShards:
    """The asks of one step: the same for each layer, without the replicas that have failed since its beginning."""

    def __init__(self, client: ShardClient, asks: Sequence[Ask]) -> None:
        self.client = client
        self.asks = list(asks)

    def begin(self, layer: str, query: torch.Tensor, scale: float, softcap: float) -> dict[int, Ask]:
        """Send out what a layer asks for; query is the step's, (tokens, heads, head size)."""
        sent = {}
        for ask in list(self.asks):
            try:
                number = self.client.ask(ask, layer, query[torch.from_numpy(ask.tokens)], scale, softcap)
            except MessageError as error:
                self._lose(ask, str(error))
            else:
                sent[number] = ask
        return sent

    def finish(self, sent: dict[int, Ask], out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge the answers into the step's own out (tokens, heads, head size) and lse (tokens, heads)."""
        if not sent:
            return
        deadlines = {number: self._limit(ask, out) for number, ask in sent.items()}
        wide, started = out.float(), time.monotonic()  # rounded once, after the last merge
        while sent:
            messages = self.client.messenger.receive()
            for message in messages:
                ask = sent.pop(message.header["id"], None)
                if ask is None:
                    continue  # an answer that nobody waits for any more
                if "error" in message.header:
                    self._lose(ask, message.header["error"])
                else:
                    self._merge(ask, message, out.dtype, wide, lse)
            waited = time.monotonic() - started
            for number in [number for number in sent if waited > deadlines[number]]:
                self._lose(sent.pop(number), f"no answer for {waited:.0f} s")
            if not messages:
                if waited < SPIN_SECONDS:
                    os.sched_yield()
                else:
                    time.sleep(NAP_SECONDS)
        if wide is not out:
            out.copy_(wide)

    def _limit(self, ask: Ask, out: torch.Tensor) -> float:
        flops = 4 * ask.pairs(self.client.page) * out.shape[1] * out.shape[2]
        return ANSWER_SECONDS + flops / LEAST_FLOPS

    def _merge(self, ask: Ask, message: Message, dtype: torch.dtype, out: torch.Tensor, lse: torch.Tensor) -> None:
        tokens = torch.from_numpy(ask.tokens)
        shape = (len(tokens), *out.shape[1:])
        self.client.count(len(message.body))
        theirs = torch.frombuffer(message.body, dtype=dtype, count=math.prod(shape)).view(shape)
        offset = theirs.nbytes
        their_lse = torch.frombuffer(message.body, dtype=torch.float32, offset=offset).view(shape[:2])
        outs, lses = torch.stack((out[tokens], theirs.float())), torch.stack((lse[tokens], their_lse))
        out[tokens], lse[tokens] = merge(outs, lses)

    def _lose(self, ask: Ask, reason: str) -> None:
        self.asks.remove(ask)
        self.client.lose(ask, reason)
