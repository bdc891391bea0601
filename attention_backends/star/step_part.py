"""What a feature has of one step: the hooks of a part, over which the step loops; and the batch that they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from starling.attention_backends.star.rows import VirtualRows, split_rows
from starling.scheduler.star.plan import StarPlan


class Batch(NamedTuple):
    """The rows of a batch: their plans, and the arguments of ``split_rows`` beside these.

    Attributes:
        request_ids: of the rows that are no padding.
        absent: of each row the positions ``[first, stop)`` whose keys are not here; None: none are.
    """

    request_ids: list[str]
    plans: list[StarPlan | None]
    query_lens: list[int]
    seq_lens: list[int]
    absent: list[tuple[int, int] | None]

    def split(self, page_size: int, seen: Callable[[StarPlan], StarPlan | None] | None = None) -> VirtualRows | None:
        """The virtual rows for pages of ``page_size`` tokens; None where no row lies in star blocks.

        Args:
            seen: the plan that the rows of a plan follow, and None for dense rows; None: each its own.
        """
        plans = self.plans
        if seen is not None:
            plans = [None if plan is None else seen(plan) for plan in plans]
        return split_rows(plans, self.query_lens, self.seq_lens, page_size, self.absent)


class StepPart:
    """What a feature has of one step. The hooks do nothing here: a part has those that it needs.

    Attributes:
        absent: request id -> positions ``[first, stop)`` whose keys are not here.
    """

    absent: Mapping[str, tuple[int, int]] = {}

    def batch_known(self, batch: Batch) -> None:
        """The rows of the step's batch are known, before any layer runs."""

    def set_positions(self, positions: torch.Tensor) -> None:
        """The model is about to get the positions of the step's tokens, (tokens,) int64, which may be changed."""

    def ended(self) -> None:
        """The model has run, or has failed: what the part changed is to be as before."""

    def unread(self) -> str | None:
        """What of the part no layer, or not the model, has taken, so that the answer would be another one; or None."""
        return None
