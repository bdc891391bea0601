"""Attention of query and output over documents: each query is re-rotated for each.

A rotary embedding rotates a pair of a query's or key's elements by an angle for each position. A score depends on the
difference of the two angles (arXiv 2104.09864, section 3.4.2). So keys that were computed at other positions than they
stand at are met at their true distance by a query that is rotated back by the difference. Keys are neither changed nor
copied. Each pair of a query token and a block is a row of paged attention without a causal mask. The rows' results are
merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from starling.attention_backends.kernels.contract import Operands, Rotation
from starling.attention_backends.kernels.dispatch import RerotatedQueries, add_rerotated_attention
from starling.attention_backends.kernels.ranges import TokenRanges
from starling.attention_backends.star.rows import RerotatedKeys

MAX_TOKENS = 512
"""Re-rotated query tokens that one call has, or those of a single row and block where these are more.

The tensors of so few tokens stay in a CPU's cache. With 8,192 tokens a call, a step of 512 query tokens and 128 blocks
took 2.7 times as long.
"""


@dataclass(frozen=True, eq=False)
class RerotatedRows:
    """Rows of one call, R of them, with T query tokens.

    Attributes:
        tokens: (T,) int64, numbers of the step's query tokens; a token is there once for each of its blocks.
        rotate_by: (T,) int64, by how many positions each is rotated back.
        block_table: (R, C) int32.
        query_start_loc: (R + 1,) int32.
        seq_lens: (R,) int32.
    """

    tokens: torch.Tensor
    rotate_by: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    def operands(self, query: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], **options: Any) -> Operands:
        """Return the operands of the call for a layer's query (tokens, heads, head size) and caches."""
        return Operands(query, *caches, self.block_table, self.query_start_loc, self.seq_lens, **options)


def make_rerotated_rows(
    rerotated: RerotatedKeys, starts: np.ndarray, query_lens: np.ndarray, block_table: torch.Tensor, page_size: int
) -> Iterator[RerotatedRows]:
    """Yield the calls by which queries attend to documents.

    Args:
        starts, query_lens: (R,) int64, first query token of each virtual row, and their number.
        block_table: (batch rows, columns) int32.
        page_size: tokens of a page of ``block_table``.
    """
    queries = query_lens[rerotated.row]
    calls = (np.cumsum(queries) - 1) // MAX_TOKENS
    for first, stop in _runs(calls):
        yield _one_call(rerotated, slice(first, stop), starts, queries, block_table, page_size)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the ranges of equal neighbours."""
    borders = np.flatnonzero(np.diff(values)) + 1
    if len(values):
        yield from zip([0, *borders.tolist()], [*borders.tolist(), len(values)], strict=True)


def _one_call(
    rerotated: RerotatedKeys,
    part: slice,
    starts: np.ndarray,
    queries: np.ndarray,
    block_table: torch.Tensor,
    page_size: int,
) -> RerotatedRows:
    lens, keys = queries[part], rerotated.num_keys[part]
    own_starts = np.concatenate(([0], np.cumsum(lens)))
    # Token i of the call is query token i - own_starts[its row] of the row, and so on the step's.
    tokens = np.arange(own_starts[-1]) + np.repeat(starts[rerotated.row[part]] - own_starts[:-1], lens)
    columns = np.arange(-(-int(keys.max()) // page_size))
    # Columns behind a row's keys are not read, but must be in the table.
    pages = np.minimum(rerotated.first_page[part][:, None] + columns, block_table.shape[1] - 1)
    return RerotatedRows(
        torch.from_numpy(tokens),
        torch.from_numpy(np.repeat(rerotated.rotate_by[part], lens)),
        block_table[torch.from_numpy(rerotated.source[part])[:, None], torch.from_numpy(pages)].to(torch.int32),
        torch.from_numpy(own_starts.astype(np.int32)),
        torch.from_numpy(keys.astype(np.int32)),
    )


def add_rows(
    calls: Iterable[RerotatedRows],
    rotation: Rotation,
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    **options: Any,
) -> None:
    """Add the keys of these calls to the attention over all other keys.

    Args:
        query: (tokens, heads, head size), rotated to the positions of its tokens.
        caches: the layer's key and value cache.
        out: (tokens, heads, value size) float32, changed in place.
        lse: (tokens, heads) float32, changed in place.
        options: further Operands: ``scale``, ``layout`` and the like.
    """
    for rows in calls:
        queries = RerotatedQueries(rows.tokens, rows.rotate_by, rotation)
        add_rerotated_attention(rows.operands(query, caches, **options), queries, out, lse)


def ranges_as_rows(
    ranges: TokenRanges, block_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int
) -> RerotatedRows:
    """Return the ranges of decodes as rows of one token each, for a CPU's op. Token i is that of ``ranges.rows[i]``.

    Args:
        block_table, seq_lens: block table and lengths of the batch's rows, (B, C) int32 and (B,) int32.
        page_size: tokens of a page.
    """
    source = torch.from_numpy(ranges.rows[ranges.row])
    first, stop = torch.from_numpy(ranges.first), torch.from_numpy(ranges.stop)
    lens = (torch.minimum(stop, seq_lens[source]) - first).clamp_min(0)
    columns = torch.arange(-(-int(lens.max()) // page_size))
    # Columns behind a row's keys are not read, but must be in the table.
    pages = (first[:, None] // page_size + columns).clamp_max(block_table.shape[1] - 1)
    return RerotatedRows(
        torch.from_numpy(ranges.row),
        torch.from_numpy(ranges.rotate_by),
        block_table[source[:, None], pages],
        torch.arange(len(source) + 1, dtype=torch.int32),
        lens.to(torch.int32),
    )
