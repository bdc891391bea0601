"""KV that stays on other replicas, in a step: which queries go where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starling.attention_backends.star.remote_queries import RemoteQuery, make_remote_queries
from starling.attention_backends.star.step import StarStep
from starling.attention_backends.star.step_part import StepPart
from starling.scheduler.star.request_metadata import RemoteShards


class RemoteStep(StepPart):
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

    def attention(self, step: StarStep, page_size: int) -> Any | None:
        """By which layers with pages of this size query other replicas in this step; None: no row has keys there.

        features/replicas/remote_attention_client.py has the object's methods.

        Raises:
            RuntimeError: the step's rows for this page size are not made yet.
        """
        if step.batch is None or not step.has_rows(page_size):
            raise RuntimeError(f"a layer with pages of {page_size} tokens runs before its rows are made")
        rows = step.built_rows(page_size)
        if rows is None or not rows.remote:
            return None
        if page_size not in self._attention:
            queries = make_remote_queries(rows, step.batch.request_ids, self.shards, page_size)
            self._attention[page_size] = self.attend(queries)
        return self._attention[page_size]
