"""Dense heads in a step: the rows of each kind of heads, and by which calls a layer attends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.star.head_rows import HeadRows, head_runs, make_head_rows
from starling.attention_backends.star.metadata import virtual_metadata
from starling.attention_backends.star.rows import Batch
from starling.scheduler.star.plan import StarPlan

BuildOfHeads = Callable[[int, int, CommonAttentionMetadata], Any]
"""Makes a backend's metadata for calls on some heads: by the number of kinds of heads behind theirs, their own number
of KV heads, and their rows."""


class HeadCall(NamedTuple):
    """A call on the KV heads ``[first, stop)`` of a layer, with the backend's metadata for it."""

    first: int
    stop: int
    metadata: Any


class HeadStep:
    """The dense heads of one step, some of whose plans have them.

    Args:
        plans: of the step.
        ranks: layer name -> (KV heads,) int64, the places of this rank's heads in the order of scores.
    """

    def __init__(self, plans: Iterable[StarPlan], ranks: Mapping[str, np.ndarray]) -> None:
        self.ranks = ranks
        self.counts = sorted({plan.dense_heads.count for plan in plans if plan.dense_heads})
        self.batch: Batch | None = None
        self.has_unread_heads = False
        self._rows: dict[str, Callable[[], HeadRows]] = {}
        self._calls: dict[str, list[HeadCall]] = {}

    def batch_known(self, batch: Batch) -> None:
        self.batch = batch

    def keep(
        self,
        batch: CommonAttentionMetadata,
        virtual: CommonAttentionMetadata,
        page_size: int,
        layer_names: Sequence[str],
        build: BuildOfHeads | None,
    ) -> None:
        """Note the rows of each kind of heads; comes after ``StarStep.rows`` for the same batch.

        Args:
            batch, virtual: the metadata of the batch's rows, and of those of heads that are dense for no plan.
            layer_names: the layers that have this metadata.
            build: function that makes the metadata of calls on some heads, or None if the layers don't make such calls.
        """
        assert self.batch is not None
        known = self.batch

        def of_kind(count: int) -> CommonAttentionMetadata:
            """Return the metadata of heads that are dense for plans with ``count`` dense heads or more."""
            rows = known.split(
                page_size, lambda plan: None if plan.dense_heads and plan.dense_heads.count >= count else plan
            )
            return batch if rows is None else virtual_metadata(batch, rows)

        kinds = [*map(of_kind, self.counts), virtual]
        ranked = [name for name in layer_names if name in self.ranks]
        runs = {name: runs for name in ranked if (runs := head_runs(self.counts, self.ranks[name]))}
        self.has_unread_heads |= bool(runs)
        self._rows |= dict.fromkeys(runs, functools.cache(lambda: make_head_rows(self.counts, kinds)))
        if build is None:
            return

        @functools.cache
        def built(kind: int, num_kv_heads: int) -> Any:
            return build(len(kinds) - 1 - kind, num_kv_heads, kinds[kind])

        for name, of_layer in runs.items():
            self._calls[name] = [
                HeadCall(run.first, run.stop, built(run.kind, run.stop - run.first)) for run in of_layer
            ]

    def calls(self, layer_name: str) -> list[HeadCall] | None:
        """Return the calls by which a layer attends, one for each run of heads, or None if no head of it is dense."""
        calls = self._calls.get(layer_name)
        if calls is not None:
            self.has_unread_heads = False
        return calls

    def row_heads(self, layer_name: str) -> tuple[HeadRows, torch.Tensor] | None:
        """Return the rows of a layer that attends in one call and each row's heads, or None if no head is dense."""
        if layer_name not in self._rows:
            return None
        self.has_unread_heads = False
        rows = self._rows[layer_name]()
        return rows, rows.row_heads(self.ranks[layer_name])

    def unread(self) -> str | None:
        return "a step with dense heads ran, but no layer took them" if self.has_unread_heads else None
