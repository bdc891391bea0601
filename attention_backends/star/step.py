"""The step that runs now: which plan each batch row follows.

The worker opens a step around the model runner's ``execute_model``; the metadata builders read it. Dummy,
profiling and capture runs happen outside of a step and so never see a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.star.rows import VirtualRows
from starling.attention_backends.star.step_part import Batch, StepPart
from starling.scheduler.part import HasParts
from starling.scheduler.star.plan import StarPlan

RowIds = Callable[[], Sequence[str]]


P = TypeVar("P")


class StarStep(HasParts):
    """One scheduler step that holds at least one star request.

    Args:
        plans: request id -> plan, for the star requests in the step.
        num_scheduled_tokens: request id -> tokens in this step, for all its requests.
        row_ids: returns the request id of each batch row, in the model runner's order.
        on_rows: called with the rows of the step, once, when a builder first counts them.
        parts: what features have of the step.
    """

    def __init__(
        self,
        plans: Mapping[str, StarPlan],
        num_scheduled_tokens: Mapping[str, int],
        row_ids: RowIds,
        on_rows: Callable[[VirtualRows], None],
        parts: Sequence[StepPart] = (),
    ) -> None:
        self.plans = plans
        self.num_scheduled_tokens = num_scheduled_tokens
        self.num_tokens = sum(num_scheduled_tokens.values())
        self.row_ids = row_ids
        self.on_rows = on_rows
        self.parts = parts
        self.engaged = False
        self.counted = False
        self.batch: Batch | None = None
        self._rows: dict[tuple[int, bool], VirtualRows | None] = {}

    def rows(self, common: CommonAttentionMetadata, page_size: int, anchored: bool = True) -> VirtualRows | None:
        """The batch's virtual rows for pages of ``page_size`` tokens; None where no row lies in star blocks.

        Args:
            anchored: False for a cache of which a block sees its own keys alone, not the anchor's.

        Raises:
            RuntimeError: the batch rows are not those of the scheduler's step. A plan on the wrong row
                would be silent corruption.
        """
        self.engaged = True
        key = (page_size, anchored)
        if key not in self._rows:
            self.batch = self._match(common)
            for part in self.parts:
                part.batch_known(self.batch)
            self._rows[key] = self.batch.split(page_size, None if anchored else without_anchor)
        return self._rows[key]

    def built_rows(self, page_size: int) -> VirtualRows | None:
        """The rows that an earlier call of ``rows`` made for this page size."""
        return self._rows.get((page_size, True))

    def has_rows(self, page_size: int) -> bool:
        """Whether ``rows`` was called for this page size."""
        return (page_size, True) in self._rows

    def count(self, rows: VirtualRows) -> None:
        """Report the step's rows, if no layer before has."""
        if not self.counted:
            self.counted = True
            self.on_rows(rows)

    def _match(self, common: CommonAttentionMetadata) -> Batch:
        """The plans of the batch's rows."""
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
        absent = {name: span for part in self.parts for name, span in part.absent.items()}
        none = [None] * len(padding)
        spans = [*map(absent.get, ids), *none]
        return Batch(ids, [*map(self.plans.get, ids), *none], query_lens, seq_lens, spans)


def without_anchor(plan: StarPlan) -> StarPlan:
    """The plan of a cache of which a block sees its own keys alone."""
    return replace(plan, anchor_size=0)


_current: StarStep | None = None


def current_step() -> StarStep | None:
    """The open step; None in dense steps and outside of steps."""
    return _current


def current_part(kind: type[P]) -> P | None:
    """The part of a class that the open step has; None: there is none, or no step."""
    return None if _current is None else _current.part(kind)


def set_positions(positions: torch.Tensor) -> None:
    """Give the tokens of the open step, if there is one, the positions that its plans have for them.

    Args:
        positions: (tokens,) int64, those that the model is about to get; changed in place.
    """
    for part in () if _current is None else _current.parts:
        part.set_positions(positions)


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
        for part in () if step is None else step.parts:
            part.ended()
    if step is None:
        return
    if not step.engaged:
        raise RuntimeError("a step with star requests ran, but no full-attention layer took their plans")
    for part in step.parts:
        unread = part.unread()
        if unread is not None:
            raise RuntimeError(unread)
