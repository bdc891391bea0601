"""Queries other replicas for the attention over their shards while a step runs, and merges the responses.

A step can't fail for one of its requests alone, and an exception would end the engine. So where a replica does not
respond, the step goes on without its shard. The end of the step reports which requests are lost: the scheduler discards
their tokens and takes the pages that they filled out of the prefix cache (core.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence

import torch
from vllm.logger import init_logger

from starling.attention_backends.kernels.merge import merge
from starling.attention_backends.star.remote_queries import RemoteQuery
from starling.features.replicas.connector_metadata import WorkerReport
from starling.features.replicas.notifications import Message, MessageError, MessageLimits, Messenger
from starling.features.replicas.remote_attention_server import to_bytes
from starling.features.replicas.remote_query import error_of

logger = init_logger("vllm.starling")

RESPONSE_SECONDS = 10.0
"""Seconds that a response may take besides its arithmetic."""

MIN_FLOPS = 1e9
"""The arithmetic of a response may take as long as a replica of this many FLOP/s needs."""

SPIN_SECONDS = 0.0005
"""For this long the client looks for responses without sleeping."""

NAP_SECONDS = 0.00005


class RemoteAttentionClient:
    """The connections of one worker to the replicas that hold shards.

    Args:
        name: unique among all workers.
        rank: tensor-parallel rank of the worker, which queries the same rank of other replicas.
        count_bytes: called with the bytes of each query and of each response.
        limits: of the messages that it receives.
    """

    def __init__(self, name: str, rank: int, count_bytes: Callable[[int], None], limits: MessageLimits) -> None:
        self.messenger = Messenger(name, limits)
        self.rank, self.count_bytes = rank, count_bytes
        self.num_sent = 0
        self.lost: dict[str, str] = {}

    def take_lost(self) -> WorkerReport | None:
        """Return the requests lost since the last call, or None if there are none."""
        lost, self.lost = self.lost, {}
        return WorkerReport(lost) if lost else None

    def step(self, queries: Sequence[RemoteQuery]) -> StepRemoteAttention:
        return StepRemoteAttention(self, queries)

    def send(self, remote: RemoteQuery, layer: str, query: torch.Tensor, scale: float, softcap: float) -> int:
        """Send a replica the query tokens of one layer.

        Args:
            query: (T, heads, head size).

        Returns:
            The number of the query, which the response has too.

        Raises:
            MessageError: the replica can't be reached.
        """
        address = remote.addresses[self.rank]
        if not self.messenger.is_connected(address["name"]):
            self.messenger.connect(address)
            self.messenger.send(address["name"], {"hello": self.messenger.address})
        self.num_sent += 1
        header = {
            "id": self.num_sent,
            "layer": layer,
            "scale": scale,
            "softcap": softcap,
            "dtype": str(query.dtype).removeprefix("torch."),
            "heads": query.shape[1],
            "size": query.shape[2],
            "spans": [
                (
                    *(each.shard, each.first_query, each.num_queries),
                    *(each.first_pages.tolist(), each.num_keys.tolist(), each.rotate_by.tolist()),
                )
                for each in remote.spans
            ],
        }
        body = to_bytes(query)
        self.messenger.send(address["name"], header, body)
        self.count_bytes(len(body))
        return self.num_sent

    def fail(self, remote: RemoteQuery, reason: str) -> None:
        """Record the requests of a query without a response as lost, and close the connection."""
        name = remote.addresses[self.rank]["name"]
        for span in remote.spans:
            if span.request_id not in self.lost:
                logger.error("%s: its KV in %s can't be attended to: %s", span.request_id, name, reason)
                self.lost[span.request_id] = reason
        try:
            self.messenger.disconnect(name)
        except MessageError as error:
            logger.error("remote attention: %s", error)


class StepRemoteAttention:
    """The queries of one step: equal for each layer, without the replicas that have failed since the step began."""

    def __init__(self, client: RemoteAttentionClient, queries: Sequence[RemoteQuery]) -> None:
        self.client = client
        self.queries = list(queries)

    def begin(self, layer: str, query: torch.Tensor, scale: float, softcap: float) -> dict[int, RemoteQuery]:
        """Send the queries of one layer.

        Args:
            query: the step's, (tokens, heads, head size).

        Returns:
            The sent queries by number, for ``finish``.
        """
        sent = {}
        for remote in list(self.queries):
            try:
                number = self.client.send(remote, layer, query[torch.from_numpy(remote.tokens)], scale, softcap)
            except MessageError as error:
                self._fail(remote, str(error))
            else:
                sent[number] = remote
        return sent

    def finish(self, sent: dict[int, RemoteQuery], out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge the responses into the attention over this replica's own keys.

        Args:
            sent: the result of ``begin``.
            out: (tokens, heads, head size) of the step, changed in place.
            lse: (tokens, heads) of the step, changed in place.
        """
        if not sent:
            return
        limits = {number: self._limit(remote, out) for number, remote in sent.items()}
        wide, started = out.float(), time.monotonic()  # rounded once, after the last merge
        while sent:
            messages = self.client.messenger.receive()
            for message in messages:
                self._take(message, sent, out.dtype, wide, lse)
            waited = time.monotonic() - started
            for number in [number for number in sent if waited > limits[number]]:
                self._fail(sent.pop(number), f"no answer for {waited:.0f} s")
            if not messages:
                if waited < SPIN_SECONDS:
                    os.sched_yield()
                else:
                    time.sleep(NAP_SECONDS)
        if wide is not out:
            out.copy_(wide)

    def _take(
        self, message: Message, sent: dict[int, RemoteQuery], dtype: torch.dtype, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Take in one message; an exception here would end the engine."""
        if "failed" in message.header:
            for failed in [number for number, remote in sent.items() if self._name(remote) == message.sender]:
                self._fail(sent.pop(failed), str(message.header["failed"]))
            return
        number = message.header.get("id")
        if not isinstance(number, int) or number not in sent or self._name(sent[number]) != message.sender:
            return  # the response to a query that has failed, or no response
        remote, error = sent.pop(number), error_of(message.header)
        if error is None:
            try:
                self._merge(remote, message, dtype, out, lse)
            except ValueError as mismatch:
                error = f"its response does not fit the query: {mismatch}"
        if error is not None:
            self._fail(remote, error)

    def _name(self, remote: RemoteQuery) -> str:
        return remote.addresses[self.client.rank]["name"]

    def _limit(self, remote: RemoteQuery, out: torch.Tensor) -> float:
        """Seconds that a response may take."""
        flops = 4 * remote.pairs() * out.shape[1] * out.shape[2]
        return RESPONSE_SECONDS + flops / MIN_FLOPS

    def _merge(
        self, remote: RemoteQuery, message: Message, dtype: torch.dtype, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Merge a response.

        Raises:
            ValueError: it has another size than the query's response.
        """
        tokens = torch.from_numpy(remote.tokens)
        shape = (len(tokens), *out.shape[1:])
        self.client.count_bytes(len(message.body))
        wanted = math.prod(shape) * dtype.itemsize + 4 * math.prod(shape[:2])
        if len(message.body) != wanted:
            raise ValueError(f"it has {len(message.body)} bytes, and not {wanted}")
        remote_out = torch.frombuffer(message.body, dtype=dtype, count=math.prod(shape)).view(shape)
        remote_lse = torch.frombuffer(message.body, dtype=torch.float32, offset=remote_out.nbytes).view(shape[:2])
        outs, lses = torch.stack((out[tokens], remote_out.float())), torch.stack((lse[tokens], remote_lse))
        out[tokens], lse[tokens] = merge(outs, lses)

    def _fail(self, remote: RemoteQuery, reason: str) -> None:
        self.queries.remove(remote)
        self.client.fail(remote, reason)
