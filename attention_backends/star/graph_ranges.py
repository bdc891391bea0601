"""Decode steps of engines that are made for documents in full CUDA graphs: one table that all graphs read.

A captured layer runs the kernels of kernels/triton/ranges.py for all rows, those of dense prompts too. What it launches
depends on the number of rows alone. Before a replay, vLLM builds the step's metadata, and the table is filled for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.kernels.ranges import RangeTable, TokenRanges, packed_size
from starling.attention_backends.star.range_attention import make_token_ranges
from starling.attention_backends.star.rows import VirtualRows
from starling.scheduler.star.plan import StarPlan

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
