"""KV that stays on other replicas, in a step: which queries go where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starling.attention_backends.star.remote_queries import RemoteQuery, make_remote_queries
from starling.attention_backends.star.rows import VirtualRows
from starling.scheduler.star.request_metadata import RemoteShards


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
