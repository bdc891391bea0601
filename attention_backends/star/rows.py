"""Virtual rows: phase 1 of Star Attention as plain causal varlen paged attention.

A batch row whose query span lies in star blocks is cut at block borders. Each piece becomes a row of its
own whose block table holds just the pages it may see (anchor, overlap, own block) and whose length is the
sum of those. K is cached after RoPE, so the place of a key in the table does not matter, and causal
attention aligned bottom-right is exactly the star mask. vLLM does the same for chunked local attention
(vllm/model_executor/layers/attention/chunked_local_attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.star.plan import KeyRanges, StarPlan, count_pairs


@dataclass(frozen=True)
class RemoteKeys:
    """Whole pages on other replicas, before a row's queries; every query of the row sees all of them."""

    row: int
    keys: KeyRanges


@dataclass(frozen=True)
class VirtualRows:
    """The rows that replace a batch's own, in order; R of them.

    Attributes:
        source: (R,) int64, the batch row each one comes from.
        query_lens: (R,) int64, its tokens in this step.
        seq_lens: (R,) int64, keys it sees, its own included.
        star: (R,) bool, whether the row lies in the context of a star plan.
        block_start: (R,) int64, where its star block starts; 0 for the other rows.
        gathered: (G,) int64, rows whose pages are not those of ``source`` in order.
        page_columns: (G, W) int64, for each of these the columns of the source's block table; W is their widest.
        remote: rows that also see keys in other replicas' memory, which ``seq_lens`` and the pages leave out.
        context_tokens: query tokens in star rows.
        star_pairs: query-key pairs of the star rows, per head and layer (a mean where layers differ).
        dense_pairs: the pairs that the same tokens would have under dense attention.
    """

    source: np.ndarray
    query_lens: np.ndarray
    seq_lens: np.ndarray
    star: np.ndarray
    block_start: np.ndarray
    gathered: np.ndarray
    page_columns: np.ndarray
    remote: tuple[RemoteKeys, ...]
    context_tokens: int
    star_pairs: float
    dense_pairs: float


def split_rows(
    plans: Sequence[StarPlan | None],
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    page_size: int,
    remote_spans: Sequence[tuple[int, int] | None] = (),
) -> VirtualRows | None:
    """Split a batch of rows by their plans; None where no row lies in star blocks or has keys on other replicas.

    Args:
        plans: one a row; None for a dense row.
        query_lens: tokens of each row in this step (0 for padding rows).
        seq_lens: tokens of each row so far, this step's included.
        page_size: tokens of a page of the block table.
        remote_spans: one a row, or none at all: the positions, in whole pages, whose KV other replicas hold.
    """
    remote_spans = remote_spans or [None] * len(plans)
    starts = [length - queries for queries, length in zip(query_lens, seq_lens, strict=True)]
    if not any(
        queries and (span is not None or (plan is not None and start < plan.context_end))
        for plan, queries, start, span in zip(plans, query_lens, starts, remote_spans, strict=True)
    ):
        return None
    source: list[int] = []
    lens: list[int] = []
    totals: list[int] = []
    star: list[bool] = []
    block_starts: list[int] = []
    gathered: list[int] = []
    columns: list[np.ndarray] = []
    remote: list[RemoteKeys] = []
    context_tokens = star_pairs = dense_pairs = 0
    for row, (plan, start, end, span) in enumerate(zip(plans, starts, seq_lens, remote_spans, strict=True)):
        pieces = [(start, end, ((0, end),))] if plan is None or start == end else plan.split(start, end)
        for piece_start, piece_end, keys in pieces:
            in_context, block_start = False, 0
            if plan is not None and piece_start < plan.context_end:
                in_context, block_start = True, piece_start // plan.block_size * plan.block_size
                queries = piece_end - piece_start
                context_tokens += queries
                star_pairs += count_pairs(queries, keys)
                dense_pairs += count_pairs(queries, ((0, piece_end),))
            if span is not None:
                keys, remote_keys = divide(keys, span)
                if remote_keys:
                    remote.append(RemoteKeys(len(source), remote_keys))
            if keys[0][0] or len(keys) > 1:
                gathered.append(len(source))
                columns.append(_page_columns(keys, page_size))
            source.append(row)
            lens.append(piece_end - piece_start)
            totals.append(sum(stop - first for first, stop in keys))
            star.append(in_context)
            block_starts.append(block_start)
    page_columns = np.zeros((len(columns), max(map(len, columns), default=0)), dtype=np.int64)
    for index, column in enumerate(columns):
        page_columns[index, : len(column)] = column
    return VirtualRows(
        np.asarray(source, dtype=np.int64),
        np.asarray(lens, dtype=np.int64),
        np.asarray(totals, dtype=np.int64),
        np.asarray(star, dtype=bool),
        np.asarray(block_starts, dtype=np.int64),
        np.asarray(gathered, dtype=np.int64),
        page_columns,
        tuple(remote),
        context_tokens,
        star_pairs,
        dense_pairs,
    )


def divide(keys: KeyRanges, span: tuple[int, int]) -> tuple[KeyRanges, KeyRanges]:
    """The parts of ranges that lie outside of a span, and those inside."""
    first, last = span
    outside = [piece for start, stop in keys for piece in ((start, min(stop, first)), (max(start, last), stop))]
    inside = [(max(start, first), min(stop, last)) for start, stop in keys]

    def kept(pieces: list[tuple[int, int]]) -> KeyRanges:
        return tuple((start, stop) for start, stop in pieces if start < stop)

    return kept(outside), kept(inside)


def _page_columns(keys: KeyRanges, page_size: int) -> np.ndarray:
    return np.concatenate([np.arange(start // page_size, -(-stop // page_size)) for start, stop in keys])
