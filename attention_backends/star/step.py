"""The step that runs now: which plan each batch row follows.

The worker opens a step around the model runner's ``execute_model``; the metadata builders read it. Dummy,
profiling and capture runs happen outside of a step and so never see a plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.kernels import devices
from starling.attention_backends.kernels.ranges import RangeTable
from starling.attention_backends.kernels.rotary import Rotation
from starling.attention_backends.star.head_rows import HeadRows, head_runs, make_head_rows
from starling.attention_backends.star.metadata import virtual_metadata
from starling.attention_backends.star.range_attention import RangeAttention, make_range_attention
from starling.attention_backends.star.remote_queries import RemoteQuery, make_remote_queries
from starling.attention_backends.star.rows import VirtualRows, split_rows
from starling.attention_backends.star.turned_attention import TurnedAttention, make_turned_attention
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import RemoteShards

RowIds = Callable[[], Sequence[str]]
BuildOfHeads = Callable[[int, int, CommonAttentionMetadata], Any]
"""Makes a backend's metadata for calls on some heads: by the number of kinds of heads behind theirs, their own number
of KV heads, and their rows."""


class HeadCall(NamedTuple):
    """A call on the KV heads ``[first, stop)`` of a layer, with the backend's metadata for it."""

    first: int
    stop: int
    metadata: Any


class Batch(NamedTuple):
    """The rows of a batch: their plans, and the arguments of ``split_rows`` beside these."""

    plans: list[StarPlan | None]
    query_lens: list[int]
    seq_lens: list[int]
    remote_spans: list[tuple[int, int] | None]

    def split(self, page_size: int, anchored: bool = True, dense_from: int | None = None) -> VirtualRows | None:
        """The virtual rows for pages of ``page_size`` tokens; None where no row lies in star blocks.

        Args:
            anchored: False for a cache of which a block sees its own keys alone, not the anchor's.
            dense_from: the rows of heads that are dense for plans with so many dense heads or more; None: for no plan.
        """

        def seen(plan: StarPlan | None) -> StarPlan | None:
            if plan is None or (dense_from and plan.dense_heads and plan.dense_heads.count >= dense_from):
                return None
            return plan if anchored else replace(plan, anchor_size=0)

        return split_rows(list(map(seen, self.plans)), self.query_lens, self.seq_lens, page_size, self.remote_spans)


class StarStep:
    """One scheduler step that holds at least one star request.

    Args:
        plans: request id -> plan, for the star requests in the step.
        num_scheduled_tokens: request id -> tokens in this step, for all its requests.
        row_ids: returns the request id of each batch row, in the model runner's order.
        on_rows: called with the rows of the step, once, when a builder first counts them.
        remote: request id -> where the rest of its KV is, for requests that have KV on other replicas.
        open_remote_attention: makes the object by which layers query other replicas, from the step's queries.
        rotations: layer name -> its rotary embedding, for plans whose blocks have positions of their own.
        head_ranks: layer name -> (KV heads,) int64, the places of this rank's heads in the order of scores, for plans
            with dense heads.
    """

    def __init__(
        self,
        plans: Mapping[str, StarPlan],
        num_scheduled_tokens: Mapping[str, int],
        row_ids: RowIds,
        on_rows: Callable[[VirtualRows], None],
        remote: Mapping[str, RemoteShards] | None = None,
        open_remote_attention: Callable[[Sequence[RemoteQuery]], Any] | None = None,
        rotations: Mapping[str, Rotation] | None = None,
        head_ranks: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.plans = plans
        self.num_scheduled_tokens = num_scheduled_tokens
        self.num_tokens = sum(num_scheduled_tokens.values())
        self.row_ids = row_ids
        self.on_rows = on_rows
        self.remote = remote or {}
        self.open_remote_attention = open_remote_attention
        self.rotations = rotations or {}
        self.head_ranks = head_ranks or {}
        self.dense_counts = sorted({plan.dense_heads.count for plan in plans.values() if plan.dense_heads})
        self.engaged = False
        self.counted = False
        self._request_ids: list[str] = []
        self._batch = Batch([], [], [], [])
        self._rows: dict[tuple[int, bool], VirtualRows | None] = {}
        self._remote_attention: dict[int, Any] = {}
        self._turned_attention: dict[int, TurnedAttention | RangeAttention] = {}
        self._head_rows: dict[str, Callable[[], HeadRows]] = {}
        self._head_calls: dict[str, list[HeadCall]] = {}
        self._shifts: np.ndarray | None = None
        self._shifted: tuple[torch.Tensor, torch.Tensor] | None = None
        self.has_unset_positions = False
        self.has_unread_heads = False

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
            self._batch = self._match(common)
            self._keep_positions(self._batch)
            self._rows[key] = self._batch.split(page_size, anchored=anchored)
        return self._rows[key]

    def built_rows(self, page_size: int) -> VirtualRows | None:
        """The rows that an earlier call of ``rows`` made for this page size."""
        return self._rows.get((page_size, True))

    def remote_attention(self, page_size: int) -> Any | None:
        """By which layers with pages of this size query other replicas in this step; None: no row has keys there.

        replicas/remote_attention_client.py has the object's methods.

        Raises:
            RuntimeError: the step's rows for this page size are not made yet.
        """
        if self.open_remote_attention is None:
            return None
        if (page_size, True) not in self._rows:
            raise RuntimeError(f"a layer with pages of {page_size} tokens runs before its rows are made")
        rows = self.built_rows(page_size)
        if rows is None or not rows.remote:
            return None
        if page_size not in self._remote_attention:
            shards = {name: remote.shards for name, remote in self.remote.items()}
            queries = make_remote_queries(rows, self._request_ids, shards, page_size)
            self._remote_attention[page_size] = self.open_remote_attention(queries)
        return self._remote_attention[page_size]

    def keep_ranges(
        self,
        rows: VirtualRows,
        batch: CommonAttentionMetadata,
        page_size: int,
        table: RangeTable | None,
        tile_queries: int,
    ) -> bool:
        """Note the keys of rows that see blocks with positions of their own, on a GPU.

        Args:
            batch: the metadata of the batch's rows, with pages of ``page_size`` tokens.
            table: the keys of all rows, in a step of decodes that may replay a CUDA graph.
            tile_queries: as of ``make_range_attention``.

        Returns:
            Whether these keys are all that layers read, so that nobody reads metadata of virtual rows.
        """
        if rows.turned is None or not devices.uses_triton(batch.seq_lens.device):
            return False
        if table is not None:
            made = RangeAttention(self.rotations, [table])
        else:
            made = make_range_attention(rows, batch, page_size, self.rotations, tile_queries)
        self._turned_attention[page_size] = made
        return made.is_whole_step and not self.dense_counts

    def keep_block_tables(
        self, rows: VirtualRows, batch: CommonAttentionMetadata, virtual: CommonAttentionMetadata, page_size: int
    ) -> None:
        """Note what the rows' own block tables leave out, on a CPU: blocks with positions of their own.

        Args:
            batch, virtual: the metadata of the batch's rows, and of ``rows``, with pages of ``page_size`` tokens.
        """
        if rows.turned is not None and not devices.uses_triton(batch.seq_lens.device):
            made = make_turned_attention(rows, batch, virtual, page_size, self.rotations)
            self._turned_attention[page_size] = made

    def keep_heads(
        self,
        batch: CommonAttentionMetadata,
        virtual: CommonAttentionMetadata,
        page_size: int,
        layer_names: Sequence[str],
        build: BuildOfHeads | None,
    ) -> None:
        """Note the rows of each kind of heads, where the step has dense heads; behind ``rows`` for the same batch.

        Args:
            batch, virtual: the metadata of the batch's rows, and of those of heads that are dense for no plan.
            layer_names: the layers that have this metadata.
            build: makes the metadata of calls on some of their heads; None: the layers don't make such calls.
        """
        if not self.dense_counts:
            return
        split = [self._batch.split(page_size, dense_from=count) for count in self.dense_counts]
        kinds = [*(batch if rows is None else virtual_metadata(batch, rows) for rows in split), virtual]
        ranked = [name for name in layer_names if name in self.head_ranks]
        runs = {name: runs for name in ranked if (runs := head_runs(self.dense_counts, self.head_ranks[name]))}
        self.has_unread_heads |= bool(runs)
        self._head_rows |= dict.fromkeys(runs, functools.cache(lambda: make_head_rows(self.dense_counts, kinds)))
        if build is None:
            return

        @functools.cache
        def built(kind: int, num_kv_heads: int) -> Any:
            return build(len(kinds) - 1 - kind, num_kv_heads, kinds[kind])

        for name, of_layer in runs.items():
            self._head_calls[name] = [
                HeadCall(run.first, run.stop, built(run.kind, run.stop - run.first)) for run in of_layer
            ]

    def head_calls(self, layer_name: str) -> list[HeadCall] | None:
        """The calls by which a layer attends, one for each run of heads; None: no head of it is dense."""
        calls = self._head_calls.get(layer_name)
        if calls is not None:
            self.has_unread_heads = False
        return calls

    def row_heads(self, layer_name: str) -> tuple[HeadRows, torch.Tensor] | None:
        """The rows of a layer that attends in one call, and which heads each computes; None: no head of it is dense."""
        if layer_name not in self._head_rows:
            return None
        self.has_unread_heads = False
        rows = self._head_rows[layer_name]()
        return rows, rows.row_heads(self.head_ranks[layer_name])

    def turned_attention(self, page_size: int) -> Any | None:
        """By which layers with pages of this size attend to such blocks; None: no row has keys there.

        It is a RangeAttention on a GPU, and a TurnedAttention on a CPU.

        Raises:
            RuntimeError: rows have keys there, but none are noted for this page size.
        """
        if not self._turned_attention:
            return None
        if page_size not in self._turned_attention:
            raise RuntimeError(f"no rows with pages of {page_size} tokens are made for a layer that has such pages")
        return self._turned_attention[page_size]

    def set_positions(self, positions: torch.Tensor) -> None:
        """Give the tokens of such blocks, and those behind them, the positions of their plan.

        Args:
            positions: (tokens,) int64, those of the step's tokens in its prompts; changed in place.

        Raises:
            RuntimeError: the positions are not one number a token.
        """
        self.has_unset_positions = False
        if self._shifts is None:
            return
        if positions.dim() != 1:
            raise RuntimeError(f"positions of shape {tuple(positions.shape)} can't be those of a plan")
        part, shifts = positions[: len(self._shifts)], async_tensor_h2d(self._shifts, positions.device, positions.dtype)
        part += shifts
        self._shifted = part, shifts

    def restore_positions(self) -> None:
        """Undo ``set_positions``: the sampler of model runner V2 counts a request's output tokens by its positions."""
        if self._shifted is not None:
            part, shifts = self._shifted
            part -= shifts
            self._shifted = None

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
        self._request_ids = ids
        spans = [self.remote[name].span() if name in self.remote else None for name in ids] + [None] * len(padding)
        return Batch([self.plans.get(name) for name in ids] + [None] * len(padding), query_lens, seq_lens, spans)

    def _keep_positions(self, batch: Batch) -> None:
        """Note by how many positions each token is computed behind its index in the prompt, where any is."""
        shifts, first = np.zeros(self.num_tokens, dtype=np.int64), 0
        for plan, queries, end in zip(batch.plans, batch.query_lens, batch.seq_lens, strict=False):
            if plan is not None and plan.documents:
                shifts[first : first + queries] = plan.shifts(end - queries, end)
                self._shifts = shifts
            first += queries
        self.has_unset_positions = self._shifts is not None


_current: StarStep | None = None


def current_step() -> StarStep | None:
    """The open step; None in dense steps and outside of steps."""
    return _current


def set_positions(positions: torch.Tensor) -> None:
    """Give the tokens of the open step, if there is one, the positions that its plans have for them.

    Args:
        positions: (tokens,) int64, those that the model is about to get; changed in place.
    """
    if _current is not None:
        _current.set_positions(positions)


@contextmanager
def open_step(step: StarStep | None) -> Iterator[None]:
    """Make ``step`` the current one. The positions that its forward pass changed are restored at its end.

    Raises:
        RuntimeError: no attention layer read the plans, or the model did not take their positions. The answer would be
            another one without saying so.
    """
    global _current
    _current = step
    try:
        yield
    finally:
        _current = None
        if step is not None:
            step.restore_positions()
    if step is not None and not step.engaged:
        raise RuntimeError("a step with star requests ran, but no full-attention layer took their plans")
    if step is not None and step.has_unset_positions:
        raise RuntimeError("a step with positions of star blocks' own ran, but the model did not take them")
    if step is not None and step.has_unread_heads:
        raise RuntimeError("a step with dense heads ran, but no layer took them")
