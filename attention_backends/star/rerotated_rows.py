"""Attention of query and output over documents: each query is re-rotated for each.

A rotary embedding rotates a pair of a query's or key's elements by an angle for each position. A score depends on the
difference of the two angles (arXiv 2104.09864, section 3.4.2). So keys that were computed at other positions than they
stand at are met at their true distance by a query that is rotated back by the difference. Keys are neither changed nor
copied. A document is a row of paged attention without a causal mask, with the query tokens that see it. Tokens of
several requests are in one row where the requests have the document's pages in common, at whatever place in their
prompts: these pages are read once for all of them. The rows' results are merged by their log-sum-exp.
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
MAX_SHARED = 16 * MAX_TOKENS
"""Ranges of decodes that one call has, where there are at least two to a row on average, which share their pages."""


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
    queries, keys = query_lens[rerotated.row], rerotated.num_keys
    pages = pages_of(block_table, rerotated.source, rerotated.first_page, keys, page_size)
    order, begins = grouped(pages, keys, page_size)
    calls = (np.cumsum(queries[order]) - 1) // MAX_TOKENS
    for first, stop in _runs(calls):
        part = order[first:stop]
        rows = np.concatenate(([True], begins[first + 1 : stop]))
        lens = queries[part]
        own_starts = np.concatenate(([0], np.cumsum(lens)))
        # Token i of the call is query token i - own_starts[its range] of the range's row, and so on the step's.
        tokens = np.arange(own_starts[-1]) + np.repeat(starts[rerotated.row[part]] - own_starts[:-1], lens)
        yield _rows(
            tokens,
            np.repeat(rerotated.rotate_by[part], lens),
            pages[part[rows]],
            own_starts[:-1][rows],
            keys[part[rows]],
        )


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the ranges of equal neighbours."""
    borders = np.flatnonzero(np.diff(values)) + 1
    if len(values):
        yield from zip([0, *borders.tolist()], [*borders.tolist(), len(values)], strict=True)


def pages_of(
    block_table: torch.Tensor, source: np.ndarray, first_page: np.ndarray, keys: np.ndarray, page_size: int
) -> np.ndarray:
    """Return the pages of ranges of keys, (N, C) int32, with 0 behind a range's last page.

    Args:
        block_table: (B, columns) int32, on a CPU.
        source, first_page, keys: (N,) int64, the row of ``block_table``, the first column there, the number of keys.
    """
    used = -(-keys // page_size)
    columns = np.arange(max(1, int(used.max())))
    table = block_table.numpy()
    pages = table[source[:, None], np.minimum(first_page[:, None] + columns, table.shape[1] - 1)]
    return np.where(columns < used[:, None], pages, 0)


def grouped(pages: np.ndarray, keys: np.ndarray, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an order of ranges in which those with the same pages and length are neighbours, and where groups begin.

    Args:
        pages: (N, C) int32, with 0 behind a range's last page.
        keys: (N,) int64, the lengths.

    Returns:
        (N,) int64, the order, and (N,) bool, whether a range of this order begins a group. Ranges keep their order
            where no two have the same pages. A prefix cache rarely has two ranges with the same last page that differ
            before it; they may then be in more groups than needed.
    """
    last = pages[np.arange(len(pages)), np.maximum(-(-keys // page_size) - 1, 0)].astype(np.int64)
    order = np.argsort(last << 32 | keys, kind="stable")
    sorted_pages, sorted_keys = pages[order], keys[order]
    same = (sorted_pages[1:] == sorted_pages[:-1]).all(1) & (sorted_keys[1:] == sorted_keys[:-1])
    if not same.any():
        return np.arange(len(pages)), np.ones(len(pages), dtype=bool)
    return order, np.concatenate(([True], ~same))


def _rows(
    tokens: np.ndarray, rotate_by: np.ndarray, pages: np.ndarray, starts: np.ndarray, keys: np.ndarray
) -> RerotatedRows:
    """Make a call of rows that begin at these query tokens of its own; the other arguments are as in RerotatedRows."""
    return RerotatedRows(
        torch.from_numpy(tokens),
        torch.from_numpy(rotate_by),
        torch.from_numpy(pages.astype(np.int32)),
        torch.from_numpy(np.append(starts, len(tokens)).astype(np.int32)),
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
    """Return the ranges of decodes as rows for a CPU's op. Token i is that of ``ranges.rows[i]``.

    Args:
        block_table, seq_lens: block table and lengths of the batch's rows, (B, C) int32 and (B,) int32.
        page_size: tokens of a page.
    """
    source = ranges.rows[ranges.row]
    keys = np.maximum(np.minimum(ranges.stop, seq_lens.numpy()[source]) - ranges.first, 0)
    pages = pages_of(block_table, source, ranges.first // page_size, keys, page_size)
    order, begins = grouped(pages, keys, page_size)
    starts = np.flatnonzero(begins)
    return _rows(ranges.row[order], ranges.rotate_by[order], pages[order[starts]], starts, keys[order[starts]])
