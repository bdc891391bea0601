"""What a step asks of other replicas: attention of some of its query tokens over KV that stays there.

Phase 2 of Star Attention (arXiv 2411.17116, section 2.2): each replica attends over its shard, without a causal mask
since all of it lies before the queries, and the results are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attention_backends.star.rows import VirtualRows
from scheduler.share import Shard


@dataclass(frozen=True)
class Span:
    """Consecutive query tokens, and the pages of a shard that they see.

    Attributes:
        request_id: whose tokens they are.
        shard: the name under which the holder keeps the pages.
        queries: how many tokens.
        first, pages: the first of the shard's pages, and how many.
    """

    request_id: str
    shard: str
    queries: int
    first: int
    pages: int


@dataclass(frozen=True, eq=False)
class Ask:
    """What one replica is asked for, once a layer.

    Attributes:
        addresses: of its tensor-parallel ranks.
        tokens: (T,) int64, the step's query tokens in question.
        spans: what each of them sees; their queries add up to T.
    """

    addresses: Sequence[dict[str, Any]]
    tokens: np.ndarray
    spans: tuple[Span, ...]

    def pairs(self, page: int) -> int:
        """Query-key pairs, per head."""
        return sum(span.queries * span.pages * page for span in self.spans)


def make_asks(
    rows: VirtualRows, request_ids: Sequence[str], shards: Mapping[str, Sequence[Shard]], page: int
) -> list[Ask]:
    """One for each replica that holds keys of the step's rows.

    Args:
        request_ids: of the batch's own rows.
        shards: request id -> where its keys are.
    """
    starts = np.concatenate(([0], np.cumsum(rows.query_lens)))
    found: dict[str, tuple[Sequence[dict[str, Any]], list[np.ndarray], list[Span]]] = {}
    for remote in rows.remote:
        request_id = request_ids[rows.source[remote.row]]
        tokens = np.arange(starts[remote.row], starts[remote.row + 1])
        for shard in shards[request_id]:
            for start, stop in remote.keys:
                first, last = max(start, shard.start), min(stop, shard.start + shard.tokens)
                if first >= last:
                    continue
                _, parts, spans = found.setdefault(shard.addresses[0]["name"], (shard.addresses, [], []))
                parts.append(tokens)
                pages = (first - shard.start) // page, (last - first) // page
                spans.append(Span(request_id, shard.name, len(tokens), *pages))
    return [Ask(addresses, np.concatenate(parts), tuple(spans)) for addresses, parts, spans in found.values()]
