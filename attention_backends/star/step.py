"""The step that runs now: which plan each batch row follows.

The worker opens a step around the model runner's ``execute_model``; the metadata builders read it. Dummy,
profiling and capture runs happen outside of a step and so never see a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.star.document_step import DocumentStep
from starling.attention_backends.star.head_step import HeadStep
from starling.attention_backends.star.remote_queries import RemoteStep
from starling.attention_backends.star.rows import Batch, VirtualRows
from starling.scheduler.planning.plan import StarPlan

RowIds = Callable[[], Sequence[str]]


class StarStep:
    """One scheduler step that holds at least one star request.

    Args:
        plans: request id -> plan, for the star requests in the step.
        num_scheduled_tokens: request id -> tokens in this step, for all its requests.
        row_ids: returns the request id of each batch row, in the model runner's order.
        on_rows: called with the rows of the step, once, when a builder first counts them.
        documents: the documents of the step, or None if no plan has some.
        heads: the dense heads of the step, or None if no plan has some.
        remote: the keys that other replicas hold, or None if all are here.
    """

    def __init__(
        self,
        plans: Mapping[str, StarPlan],
        num_scheduled_tokens: Mapping[str, int],
        row_ids: RowIds,
        on_rows: Callable[[VirtualRows], None],
        documents: DocumentStep | None = None,
        heads: HeadStep | None = None,
        remote: RemoteStep | None = None,
    ) -> None:
        self.plans = plans
        self.num_scheduled_tokens = num_scheduled_tokens
        self.num_tokens = sum(num_scheduled_tokens.values())
        self.row_ids = row_ids
        self.on_rows = on_rows
        self.documents, self.heads, self.remote = documents, heads, remote
        self.engaged = False
        self.counted = False
        self.batch: Batch | None = None
        self._rows: dict[tuple[int, bool], VirtualRows | None] = {}

    def rows(self, common: CommonAttentionMetadata, page_size: int, anchored: bool = True) -> VirtualRows | None:
        """Return the batch's virtual rows for pages of ``page_size`` tokens, or None if no row lies in star blocks.

        Args:
            anchored: False for a cache in which a block sees its own keys alone, not the anchor's.

        Raises:
            RuntimeError: the batch rows are not those of the scheduler's step. A plan on the wrong row
                would be silent corruption.
        """
        self.engaged = True
        key = (page_size, anchored)
        if key not in self._rows:
            self.batch = self._match(common)
            for part in (self.documents, self.heads):
                if part is not None:
                    part.batch_known(self.batch)
            self._rows[key] = self.batch.split(page_size, None if anchored else without_anchor)
        return self._rows[key]

    def built_rows(self, page_size: int) -> VirtualRows | None:
        """Return the rows that an earlier call of ``rows`` made for this page size."""
        return self._rows.get((page_size, True))

    def has_rows(self, page_size: int) -> bool:
        """Return whether ``rows`` was called for this page size."""
        return (page_size, True) in self._rows

    def remote_attention(self, page_size: int) -> Any | None:
        """Return the object by which layers with this page size query other replicas, or None if no row has keys there.

        Raises:
            RuntimeError: the step's rows for this page size are not made yet.
        """
        if self.remote is None:
            return None
        if self.batch is None or not self.has_rows(page_size):
            raise RuntimeError(f"a layer with pages of {page_size} tokens runs before its rows are made")
        return self.remote.attention(self.built_rows(page_size), self.batch.request_ids, page_size)

    def count(self, rows: VirtualRows) -> None:
        """Report the step's rows, if no layer before has."""
        if not self.counted:
            self.counted = True
            self.on_rows(rows)

    def _match(self, common: CommonAttentionMetadata) -> Batch:
        """Match the batch's rows with their plans."""
        query_lens = common.query_start_loc_cpu.diff().tolist()
        ids = list(self.row_ids())
        scheduled = [self.num_scheduled_tokens[request_id] for request_id in ids]
        padding = query_lens[len(ids) :]
        if query_lens[: len(ids)] != scheduled or any(padding):
            raise RuntimeError(
                f"batch rows {ids} have {query_lens} tokens, the scheduler gave {scheduled}: "
                "star plans can't be matched to rows"
            )
        if common.seq_lens_cpu_upper_bound is None:
            raise RuntimeError("the model runner gave no host copy of seq_lens: rows can't be split")
        seq_lens = common.seq_lens_cpu_upper_bound.tolist()
        seq_lens[len(ids) :] = [0] * len(padding)
        absent = {} if self.remote is None else self.remote.absent
        none = [None] * len(padding)
        spans = [*map(absent.get, ids), *none]
        return Batch(ids, [*map(self.plans.get, ids), *none], query_lens, seq_lens, spans)


def without_anchor(plan: StarPlan) -> StarPlan:
    """Return the plan of a cache in which a block sees its own keys alone."""
    return replace(plan, anchor_size=0)


_current: StarStep | None = None


def current_step() -> StarStep | None:
    """Return the open step, or None in dense steps and outside of steps."""
    return _current


def set_positions(positions: torch.Tensor) -> None:
    """Give the tokens of the open step, if there is one, the positions that its plans have for them.

    Args:
        positions: (tokens,) int64, those that the model is about to get; changed in place.
    """
    if _current is not None and _current.documents is not None:
        _current.documents.set_positions(positions)


@contextmanager
def open_step(step: StarStep | None) -> Iterator[None]:
    """Make ``step`` the current one. What its parts changed for its forward pass is restored at its end.

    Raises:
        RuntimeError: no attention layer read the plans, or a part was not taken. The answer would be another one
            without saying so.
    """
    global _current
    _current = step
    try:
        yield
    finally:
        _current = None
        if step is not None and step.documents is not None:
            step.documents.ended()
    if step is None:
        return
    if not step.engaged:
        raise RuntimeError("a step with star requests ran, but no full-attention layer took their plans")
    for part in (step.documents, step.heads):
        if part is not None and (unread := part.unread()) is not None:
            raise RuntimeError(unread)
