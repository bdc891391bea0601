"""What a step sends to other replicas: queries for attention over KV that stays there.

Phase 2 of Star Attention (arXiv 2411.17116, section 2.2): each replica attends over its shard, without a causal mask
since all of the shard lies before the queries, and the results are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attention_backends.star.rows import VirtualRows
from scheduler.star.request_metadata import Shard


@dataclass(frozen=True)
class RemoteSpan:
    """Consecutive query tokens, and the pages of a shard that they see.

    Attributes:
        request_id: the request of the tokens.
        shard: the name under which the other replica holds the pages.
        num_queries: how many tokens.
        first_page, num_pages: the shard's first page that they see, counted from its start, and how many pages.
    """

    request_id: str
    shard: str
    num_queries: int
    first_page: int
    num_pages: int


@dataclass(frozen=True, eq=False)
class RemoteQuery:
    """The query tokens that one replica gets in a step, once for each layer.

    Attributes:
        addresses: of the replica's tensor-parallel ranks.
        tokens: (T,) int64, numbers of the step's query tokens.
        spans: what each of them sees; the spans' queries add up to T.
    """

    addresses: Sequence[dict[str, Any]]
    tokens: np.ndarray
    spans: tuple[RemoteSpan, ...]

    def pairs(self, page_size: int) -> int:
        """Query-key pairs, per head."""
        return sum(span.num_queries * span.num_pages * page_size for span in self.spans)


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
    found: dict[str, tuple[Sequence[dict[str, Any]], list[np.ndarray], list[RemoteSpan]]] = {}
    for remote in rows.remote:
        request_id = request_ids[rows.source[remote.row]]
        tokens = np.arange(starts[remote.row], starts[remote.row + 1])
        for shard in shards[request_id]:
            for start, stop in remote.keys:
                first, last = max(start, shard.start), min(stop, shard.start + shard.num_tokens)
                if first >= last:
                    continue
                _, parts, spans = found.setdefault(shard.addresses[0]["name"], (shard.addresses, [], []))
                parts.append(tokens)
                pages = (first - shard.start) // page_size, (last - first) // page_size
                spans.append(RemoteSpan(request_id, shard.name, len(tokens), *pages))
    return [RemoteQuery(addresses, np.concatenate(parts), tuple(spans)) for addresses, parts, spans in found.values()]
