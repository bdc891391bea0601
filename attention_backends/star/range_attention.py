"""The attention of a step's tokens that see documents, as layers compute it on a GPU.

All keys that a token sees are ranges of its batch row, met by re-rotated queries: rerotated_rows.py says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.kernels.contract import Rotation
from starling.attention_backends.kernels.dispatch import attend_in_ranges
from starling.attention_backends.kernels.ranges import RangeTable, TokenRanges, make_range_table, packed_size
from starling.attention_backends.star.rows import VirtualRows
from starling.scheduler.planning.plan import StarPlan


def make_token_ranges(rows: VirtualRows, chosen: np.ndarray, page_size: int) -> TokenRanges:
    """All keys of some virtual rows, in the positions of their batch rows: their own, and those of documents.

    Args:
        chosen: (R,) int64, ascending, the virtual rows. Each is the end of its batch row.
        page_size: tokens of a page.
    """
    own = rows.key_ranges[np.isin(rows.key_ranges[:, 0], chosen)]
    row, first, stop, rotate_by = *own.T, np.zeros(len(own), dtype=np.int64)
    if rows.rerotated is not None:
        of_chosen = np.isin(rows.rerotated.row, chosen)
        starts = rows.rerotated.first_page[of_chosen] * page_size
        row = np.concatenate((row, rows.rerotated.row[of_chosen]))
        first = np.concatenate((first, starts))
        stop = np.concatenate((stop, starts + rows.rerotated.num_keys[of_chosen]))
        rotate_by = np.concatenate((rotate_by, rows.rerotated.rotate_by[of_chosen]))
    order = np.argsort(row, kind="stable")
    numbers = np.searchsorted(chosen, row[order])
    return TokenRanges(
        rows.source[chosen], rows.query_lens[chosen], numbers, first[order], stop[order], rotate_by[order]
    )


@dataclass(frozen=True, eq=False)
class RangeAttention:
    """The attention of one step over ranges of keys.

    Attributes:
        tables: the ranges; a token is in one of them.
        is_whole_step: whether all tokens of the step are in them.
    """

    tables: Sequence[RangeTable]
    is_whole_step: bool = True

    def attend(
        self,
        rotation: Rotation,
        query: torch.Tensor,
        out: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        **options: Any,
    ) -> None:
        """Write the attention over all keys to these tokens in ``out``.

        Args:
            rotation: the rotary embedding of the layer.
            query: (tokens, heads, head size) of the step, rotated to the positions of its tokens.
            out: (tokens, heads, value size).
            caches: the layer's keys and values, (pages, page size, KV heads, size).
            options: ``scale`` and ``softcap``.
        """
        for table in self.tables:
            attend_in_ranges(query, caches, table, rotation, out, **options)


def make_range_attention(
    rows: VirtualRows,
    batch: CommonAttentionMetadata,
    page_size: int,
    tile_queries: int,
) -> RangeAttention:
    """Make the attention of the rows that see documents; there is at least one such row.

    One kernel computes rows of one token, and another one rows of more.

    Args:
        batch: the metadata of the batch's rows.
        page_size: tokens of a page.
        tile_queries: tokens of a tile of the second kernel.
    """
    assert rows.rerotated is not None
    numbers = np.unique(rows.rerotated.row)
    query_lens = rows.query_lens[numbers]
    tensors = batch.block_table_tensor, batch.query_start_loc, batch.seq_lens
    tables = [
        make_range_table(make_token_ranges(rows, chosen, page_size), tile, *tensors)
        for chosen, tile in ((numbers[query_lens == 1], 1), (numbers[query_lens > 1], tile_queries))
        if len(chosen)
    ]
    return RangeAttention(tables, int(query_lens.sum()) == int(rows.query_lens.sum()))


MAX_RANGES = 2**18
"""Ranges of a step in a full graph: 4 MB of a GPU's memory. A step of more runs in no full graph."""

OWN_RANGES = 3
"""Ranges of a row at most beside those of its documents: the pieces that ``StarPlan.split`` leaves of its own keys."""


class GraphRanges:
    """The table of a metadata builder.

    Args:
        max_rows: requests that a step can have.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self.numbers = torch.zeros(packed_size(max_rows, MAX_RANGES), dtype=torch.int32, device=device)

    def table(self, batch: CommonAttentionMetadata) -> RangeTable:
        """Return the table for a batch whose tensors are those that a graph reads in each replay."""
        tensors = batch.block_table_tensor, batch.query_start_loc, batch.seq_lens
        return RangeTable(self.numbers, self.max_rows, 1, *tensors)

    def clear(self) -> None:
        """Leave the table without rows, for the runs of a capture."""
        self.numbers[:2] = 0

    def fill(self, batch: CommonAttentionMetadata, rows: VirtualRows | None, page_size: int) -> RangeTable | None:
        """Fill the table with all rows of a step and return it, or None if the step can't replay a graph.

        Args:
            rows: the virtual rows of the batch, or None if all its rows are dense.
            page_size: tokens of a page.
        """
        if batch.max_query_len != 1 or batch.num_reqs > self.max_rows:
            return None
        if rows is None:
            ranges = dense_ranges(batch)
        else:
            ranges = make_token_ranges(rows, np.flatnonzero(rows.query_lens == 1), page_size)
        if len(ranges.row) > MAX_RANGES:
            return None
        packed = ranges.packed(1, self.max_rows)
        async_tensor_h2d(packed, out=self.numbers[: len(packed)])
        return self.table(batch)


def fits_graphs(plans: Iterable[StarPlan], num_requests: int) -> bool:
    """Return whether the table has room for ``num_requests`` decoding requests, whatever the rows of ``plans``."""
    documents = sum(len(plan.document_keys.starts) for plan in plans if plan.document_keys is not None)
    return documents + OWN_RANGES * num_requests <= MAX_RANGES


def dense_ranges(batch: CommonAttentionMetadata) -> TokenRanges:
    """Return the keys of a batch of dense rows of one token, or of none, which pad a graph.

    Raises:
        RuntimeError: the host does not know how many keys they have.
    """
    if batch.seq_lens_cpu_upper_bound is None:
        raise RuntimeError("the model runner gave no host copy of seq_lens: a step can't run in a full CUDA graph")
    rows = np.flatnonzero(batch.query_start_loc_cpu.diff().numpy() == 1)
    stop = batch.seq_lens_cpu_upper_bound.numpy()[rows].astype(np.int64)
    zeros = np.zeros_like(rows)
    return TokenRanges(rows, np.ones_like(rows), np.arange(len(rows)), zeros, stop, zeros)
