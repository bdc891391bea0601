"""Queries that a step sends to other replicas, for attention over KV that stays there.

Phase 2 of Star Attention (arXiv 2411.17116, section 2.2): each replica attends over its shard, without a causal mask
since all of the shard lies before the queries, and the results are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from starling.attention_backends.star.rows import VirtualRows
from starling.scheduler.planning.request_metadata import RemoteShards, Shard


@dataclass(frozen=True, eq=False)
class RemoteSpan:
    """Consecutive query tokens, and the keys of a shard that they see: N ranges, each from a page border on.

    Attributes:
        request_id: the request of the tokens.
        shard: the name under which the other replica holds the pages.
        first_query, num_queries: the query's first one of these tokens, and how many there are.
        first_pages: (N,) int64, first page of each range, counted from the shard's start.
        num_keys: (N,) int64, keys of each range.
        rotate_by: (N,) int64, by how many positions the tokens are rotated back for it.
    """

    request_id: str
    shard: str
    first_query: int
    num_queries: int
    first_pages: np.ndarray
    num_keys: np.ndarray
    rotate_by: np.ndarray


@dataclass(frozen=True, eq=False)
class RemoteQuery:
    """The query tokens that one replica gets in a step, once for each layer.

    Attributes:
        addresses: of the replica's tensor-parallel ranks.
        tokens: (T,) int64, numbers of the step's query tokens.
        spans: what they see.
    """

    addresses: Sequence[dict[str, Any]]
    tokens: np.ndarray
    spans: tuple[RemoteSpan, ...]

    def pairs(self) -> int:
        """Query-key pairs, per head."""
        return sum(span.num_queries * int(span.num_keys.sum()) for span in self.spans)


class _Query:
    """A RemoteQuery in the making: its tokens, each once, and its spans."""

    def __init__(self, addresses: Sequence[dict[str, Any]]) -> None:
        self.addresses = addresses
        self.rows: dict[int, int] = {}  # virtual row -> its first query token here
        self.tokens: list[np.ndarray] = []
        self.num_tokens = 0
        self.spans: list[RemoteSpan] = []

    def first_query(self, row: int, tokens: np.ndarray) -> int:
        """Return the first query token of a row, whose tokens are added if missing."""
        if row not in self.rows:
            self.rows[row] = self.num_tokens
            self.tokens.append(tokens)
            self.num_tokens += len(tokens)
        return self.rows[row]


def make_remote_queries(
    rows: VirtualRows, request_ids: Sequence[str], shards: Mapping[str, Sequence[Shard]], page_size: int
) -> list[RemoteQuery]:
    """One query for each replica that holds keys of the step's rows.

    Args:
        request_ids: of the batch's own rows.
        shards: request id -> where its keys are.
        page_size: tokens of a KV page.
    """
    starts = np.concatenate(([0], np.cumsum(rows.query_lens)))
    found: dict[str, _Query] = {}
    for remote in rows.remote:
        request_id = request_ids[rows.source[remote.row]]
        tokens = np.arange(starts[remote.row], starts[remote.row + 1])
        for shard in shards[request_id]:
            first = np.maximum(remote.starts, shard.start)
            last = np.minimum(remote.starts + remote.lengths, shard.start + shard.num_tokens)
            seen = first < last
            if not seen.any():
                continue
            query = found.setdefault(shard.addresses[0]["name"], _Query(shard.addresses))
            first_pages, num_keys = (first - shard.start)[seen] // page_size, (last - first)[seen]
            place = query.first_query(remote.row, tokens)
            rotate_by = remote.rotate_by[seen]
            query.spans.append(RemoteSpan(request_id, shard.name, place, len(tokens), first_pages, num_keys, rotate_by))
    return [RemoteQuery(query.addresses, np.concatenate(query.tokens), tuple(query.spans)) for query in found.values()]


class RemoteStep:
    """The keys of one step that other replicas hold.

    Args:
        remote: request id -> where the rest of its KV is.
        attend: makes the object by which layers query other replicas, from the step's queries.
    """

    def __init__(self, remote: Mapping[str, RemoteShards], attend: Callable[[Sequence[RemoteQuery]], Any]) -> None:
        self.absent = {name: shards.span() for name, shards in remote.items()}
        self.shards = {name: shards.shards for name, shards in remote.items()}
        self.attend = attend
        self._attention: dict[int, Any] = {}

    def attention(self, rows: VirtualRows | None, request_ids: Sequence[str], page_size: int) -> Any | None:
        """Return the remote attention of layers with this page size, or None if no row has keys on other replicas.

        features/replicas/remote_attention_client.py has the object's methods.

        Args:
            rows: the step's virtual rows for this page size.
            request_ids: ids of the batch's rows.
        """
        if rows is None or not rows.remote:
            return None
        if page_size not in self._attention:
            queries = make_remote_queries(rows, request_ids, self.shards, page_size)
            self._attention[page_size] = self.attend(queries)
        return self._attention[page_size]
