"""The messages of remote attention: a query of one layer, and what a step can need of them at most."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from starling.features.replicas.notifications import Message, MessageLimits

SPAN_BYTES = 512
"""At least what one span of a query takes in its header, with the name of its shard, and without its ranges."""

RANGE_BYTES = 15
"""At least what one range of keys takes: three numbers."""


class QueryError(Exception):
    """A message is no query of open shards; says why."""


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive query tokens, from ``first_query`` on, and the ranges of a shard's keys that they see.

    Attributes:
        first_pages: of each range, counted from the shard's start.
        num_keys: of each range.
        rotate_by: by how many positions the tokens are rotated back for each range.
    """

    shard: str
    first_query: int
    num_queries: int
    first_pages: list[int]
    num_keys: list[int]
    rotate_by: list[int]


class Query(msgspec.Struct, frozen=True):
    """The header of a query.

    Attributes:
        id: the number of the query, which the response has too.
        scale, softcap: of the layer.
        dtype: torch's name of the query's dtype.
        heads, size: number and size of the query's heads.
        spans: what consecutive query tokens see.
    """

    id: int
    layer: str
    scale: float
    softcap: float
    dtype: str
    heads: int
    size: int
    spans: list[Span]

    def tokens(self, body: bytearray, cache: torch.Tensor) -> torch.Tensor:
        """Return the query tokens of a body, (T, heads, head size).

        Args:
            cache: KV cache of the layer, (pages, KV heads, page size, K and V).

        Raises:
            QueryError: they do not fit the layer, or the spans.
        """
        dtype, kv_heads, size = str(cache.dtype).removeprefix("torch."), cache.shape[1], cache.shape[3] // 2
        if self.dtype != dtype or self.size != size or self.heads < 1 or self.heads % kv_heads:
            raise QueryError(
                f"{self.heads} heads of size {self.size} in {self.dtype} do not fit {self.layer}, which has {kv_heads} "
                f"KV heads of size {size} in {dtype}"
            )
        token_bytes = self.heads * size * cache.element_size()
        count, rest = divmod(len(body), token_bytes)
        if rest or not count:
            raise QueryError(f"the body has {len(body)} bytes, and a query token takes {token_bytes}")
        for span in self.spans:
            if span.first_query < 0 or span.num_queries < 1 or span.first_query + span.num_queries > count:
                raise QueryError(
                    f"the body has {count} query tokens, and not {span.num_queries} from {span.first_query} on"
                )
        return torch.frombuffer(body, dtype=cache.dtype).view(count, self.heads, size)


def parse_query(message: Message) -> Query:
    """Parse the header of a message.

    Raises:
        QueryError: it is no query.
    """
    try:
        return msgspec.convert(message.header, Query)
    except msgspec.ValidationError as error:
        raise QueryError(f"the header is no query: {error}") from error


def message_limits(num_tokens: int, row_bytes: int, heads: int, num_ranges: int, num_senders: int) -> MessageLimits:
    """Limits of the messages of remote attention: each step sends one query a layer, and gets one response.

    Args:
        num_tokens: of a step, at most.
        row_bytes: of one query token, all heads.
        heads: of one query token; each has a float32 log-sum-exp in a response.
        num_ranges: ranges of keys that all requests of a step see together, at most.
        num_senders: replicas that send at the same time.
    """
    of_tokens = num_tokens * (row_bytes + 4 * heads + SPAN_BYTES) + SPAN_BYTES
    return MessageLimits(of_tokens + num_ranges * RANGE_BYTES, num_senders)


def error_of(header: dict[str, Any]) -> str | None:
    """Return the error in the header of a response, or None if it has none."""
    error = header.get("error")
    return None if error is None else str(error)
