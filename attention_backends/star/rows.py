"""Virtual rows: phase 1 of Star Attention as plain causal varlen paged attention.

A batch row whose query span lies in star blocks is cut at block borders. Each piece becomes a row of its
own whose block table holds just the pages it may see (anchor, overlap, own block) and whose length is the
sum of those. K is cached after RoPE, so the place of a key in the table does not matter, and causal
attention aligned bottom-right is exactly the star mask. vLLM does the same for chunked local attention
(vllm/model_executor/layers/attention/chunked_local_attention.py).

Example:
    A prompt of ten tokens with star blocks of four, an anchor of two, and pages of two, in one step. The row of its
    second block has pages 0 (the anchor), 2 and 3; the row of the query sees everything before it:

    >>> plan = StarPlan(block_size=4, anchor_size=2, overlap_size=0, context_end=8, num_prompt_tokens=10)
    >>> rows = split_rows([plan], query_lens=[10], seq_lens=[10], page_size=2)
    >>> rows.query_lens.tolist(), rows.seq_lens.tolist()
    ([4, 4, 2], [4, 6, 10])
    >>> rows.gathered.tolist(), rows.page_columns.tolist()
    ([1], [[0, 2, 3]])

    As a head and two documents (see plan.py), the query has a row with its own keys alone. ``rerotated`` has the
    others: of row 3, the keys of the head and of the documents, by their first page and number:

    >>> plan = StarPlan(4, 2, 0, context_end=10, num_prompt_tokens=12, documents=((0, 2), (2, 5), (6, 9)))
    >>> rows = split_rows([plan], query_lens=[12], seq_lens=[12], page_size=2)
    >>> rows.query_lens.tolist(), rows.seq_lens.tolist()
    ([2, 4, 4, 2], [2, 6, 6, 2])
    >>> keys = rows.rerotated
    >>> keys.row.tolist(), keys.first_page.tolist(), keys.num_keys.tolist(), keys.rotate_by.tolist()
    ([3, 3, 3], [0, 1, 3], [2, 3, 3], [0, 0, 3])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from starling.scheduler.planning.plan import DocumentKeys, KeyRanges, StarPlan, count_pairs, mean_pairs


@dataclass(frozen=True, eq=False)
class RemoteKeys:
    """Keys on other replicas, before a row's queries; every query of the row sees all of them.

    Attributes:
        row: the virtual row.
        starts: (N,) int64, position of the first key of each range, on a page border.
        lengths: (N,) int64, keys of each range.
        rotate_by: (N,) int64, by how many positions a query is rotated back before it meets the keys of a range.
    """

    row: int
    starts: np.ndarray
    lengths: np.ndarray
    rotate_by: np.ndarray


@dataclass(frozen=True)
class RerotatedKeys:
    """Documents, before a row's queries; every query of the row sees all of their keys.

    To meet a block's keys at the true distance, a query is rotated back. All arrays have one entry for each row and
    block, N of them.

    Attributes:
        row: (N,) int64, the virtual row.
        source: (N,) int64, the batch row whose block table has the pages.
        first_page: (N,) int64, column of the block's first page in this block table.
        num_keys: (N,) int64, keys of the block.
        rotate_by: (N,) int64, by how many positions the query is rotated back.
    """

    row: np.ndarray
    source: np.ndarray
    first_page: np.ndarray
    num_keys: np.ndarray
    rotate_by: np.ndarray


@dataclass(frozen=True)
class VirtualRows:
    """The rows that replace a batch's own, in order; R of them.

    Attributes:
        source: (R,) int64, the batch row of each virtual row.
        query_lens: (R,) int64, its tokens in this step.
        seq_lens: (R,) int64, keys it sees, its own included.
        star: (R,) bool, whether the row lies in the context of a star plan.
        block_start: (R,) int64, start of its star block; 0 for the other rows.
        gathered: (G,) int64, rows whose pages are not those of ``source`` in order.
        page_columns: (G, W) int64, for each of these the columns of the source's block table; W is their widest.
        key_ranges: (K, 3) int64, a row and ``[first, stop)`` of the batch row's positions: the keys that ``seq_lens``
            counts, by ascending rows.
        remote: rows that also see keys in other replicas' memory, which ``seq_lens`` and the pages leave out.
        rerotated: the keys of documents, which ``seq_lens`` and the pages leave out too, or None if there are none.
        context_tokens: query tokens in star rows.
        star_pairs: query-key pairs of the star rows, per head and layer (a mean where layers or heads differ).
        dense_pairs: the pairs that the same tokens would have under dense attention.
    """

    source: np.ndarray
    query_lens: np.ndarray
    seq_lens: np.ndarray
    star: np.ndarray
    block_start: np.ndarray
    gathered: np.ndarray
    page_columns: np.ndarray
    key_ranges: np.ndarray
    remote: tuple[RemoteKeys, ...]
    rerotated: RerotatedKeys | None
    context_tokens: int
    star_pairs: float
    dense_pairs: float

    @property
    def shortened(self) -> np.ndarray:
        """(R,) bool, the rows that see other keys, or fewer, than all those before them in their batch row."""
        shortened = self.star.copy()
        shortened[[remote.row for remote in self.remote]] = True
        if self.rerotated is not None:
            shortened[self.rerotated.row] = True
        return shortened


def is_split(plan: StarPlan, start: int) -> bool:
    """Return whether the tokens of a plan's prompt from position ``start`` on are split into virtual rows."""
    return start < plan.context_end or plan.document_keys is not None


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
        queries and (span is not None or (plan is not None and is_split(plan, start)))
        for plan, queries, start, span in zip(plans, query_lens, starts, remote_spans, strict=True)
    ):
        return None
    if not any(remote_spans) and all(
        plan is None or start >= plan.context_end for plan, start in zip(plans, starts, strict=True)
    ):
        return _behind_documents(plans, query_lens, seq_lens, page_size)
    pieces = _Pieces(page_size)
    for row, (plan, start, end, span) in enumerate(zip(plans, starts, seq_lens, remote_spans, strict=True)):
        whole = [(start, end, ((0, end),))]
        for piece in whole if plan is None or start == end else plan.split(start, end):
            pieces.add(row, plan, *piece, span)
    return pieces.rows()


class _Pieces:
    """The virtual rows of a batch, one after the other; the attributes are those of VirtualRows, as lists."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.source: list[int] = []
        self.query_lens: list[int] = []
        self.seq_lens: list[int] = []
        self.star: list[bool] = []
        self.block_start: list[int] = []
        self.gathered: list[int] = []
        self.columns: list[np.ndarray] = []
        self.key_ranges: list[tuple[int, int, int]] = []
        self.remote: list[RemoteKeys] = []
        self.rerotated: list[tuple[int, int, DocumentKeys]] = []
        self.context_tokens = self.star_pairs = self.dense_pairs = 0

    def add(
        self, row: int, plan: StarPlan | None, start: int, end: int, keys: KeyRanges, span: tuple[int, int] | None
    ) -> None:
        """Add the queries ``[start, end)`` of a batch row, of which the last one sees ``keys``."""
        number, in_context = len(self.source), plan is not None and start < plan.context_end
        if plan is not None and in_context:
            self._count(plan, end - start, keys, end)
        elif plan is not None and plan.document_keys is not None:
            self._add_documents(row, plan.document_keys, span or (0, 0))
        if span is not None:
            keys, remote_keys = divide(keys, span)
            if remote_keys:
                borders = np.asarray(remote_keys, dtype=np.int64)
                lengths = borders[:, 1] - borders[:, 0]
                self.remote.append(RemoteKeys(number, borders[:, 0], lengths, np.zeros_like(lengths)))
        if keys[0][0] or len(keys) > 1:
            self.gathered.append(number)
            self.columns.append(_page_columns(keys, self.page_size))
        self.key_ranges.extend((number, first, stop) for first, stop in keys if first < stop)
        self.source.append(row)
        self.query_lens.append(end - start)
        self.seq_lens.append(sum(stop - first for first, stop in keys))
        self.star.append(in_context)
        self.block_start.append(plan.starts[plan.block_of(start)] if plan is not None and in_context else 0)

    def _count(self, plan: StarPlan, queries: int, keys: KeyRanges, end: int) -> None:
        dense = count_pairs(queries, ((0, end),))
        self.context_tokens += queries
        self.star_pairs += mean_pairs(plan, count_pairs(queries, keys), dense)
        self.dense_pairs += dense

    def _add_documents(self, row: int, blocks: DocumentKeys, span: tuple[int, int]) -> None:
        number, is_remote = len(self.source), (blocks.starts >= span[0]) & (blocks.starts < span[1])
        self.rerotated.append((number, row, blocks.where(~is_remote)))
        if is_remote.any():
            away = blocks.where(is_remote)
            self.remote.append(RemoteKeys(number, away.starts, away.lengths, away.rotate_by))

    def rows(self) -> VirtualRows:
        page_columns = np.zeros((len(self.columns), max(map(len, self.columns), default=0)), dtype=np.int64)
        for index, column in enumerate(self.columns):
            page_columns[index, : len(column)] = column
        return VirtualRows(
            np.asarray(self.source, dtype=np.int64),
            np.asarray(self.query_lens, dtype=np.int64),
            np.asarray(self.seq_lens, dtype=np.int64),
            np.asarray(self.star, dtype=bool),
            np.asarray(self.block_start, dtype=np.int64),
            np.asarray(self.gathered, dtype=np.int64),
            page_columns,
            np.asarray(self.key_ranges, dtype=np.int64).reshape(-1, 3),
            tuple(self.remote),
            _rerotated_keys(self.rerotated, self.page_size),
            self.context_tokens,
            self.star_pairs,
            self.dense_pairs,
        )


def _behind_documents(
    plans: Sequence[StarPlan | None], query_lens: Sequence[int], seq_lens: Sequence[int], page_size: int
) -> VirtualRows:
    """Return the rows of a batch that is behind all contexts, as decodes are: one per batch row, made as whole arrays.

    A row behind documents sees them by ``rerotated``, and else the keys from its own context's end on.
    """
    count, ends = len(plans), np.asarray(seq_lens, dtype=np.int64)
    documents = [
        (row, row, plan.document_keys)
        for row, (plan, queries) in enumerate(zip(plans, query_lens, strict=True))
        if plan is not None and queries and plan.document_keys is not None
    ]
    first, rows = np.zeros(count, dtype=np.int64), np.arange(count)
    behind = [row for row, _, _ in documents]
    first[behind] = [plan.context_end for plan in map(plans.__getitem__, behind) if plan is not None]
    column, stop = first[behind] // page_size, -(-ends[behind] // page_size)
    columns = column[:, None] + np.arange(int((stop - column).max(initial=0)))
    has_keys = first < ends
    return VirtualRows(
        source=rows,
        query_lens=np.asarray(query_lens, dtype=np.int64),
        seq_lens=ends - first,
        star=np.zeros(count, dtype=bool),
        block_start=np.zeros(count, dtype=np.int64),
        gathered=np.asarray(behind, dtype=np.int64),
        page_columns=np.where(columns < stop[:, None], columns, 0),
        key_ranges=np.stack([rows, first, ends], 1)[has_keys],
        remote=(),
        rerotated=_rerotated_keys(documents, page_size),
        context_tokens=0,
        star_pairs=0,
        dense_pairs=0,
    )


def _rerotated_keys(rows: list[tuple[int, int, DocumentKeys]], page_size: int) -> RerotatedKeys | None:
    """Return the keys of (virtual row, batch row, documents) tuples, or None if there are none."""
    if not rows:
        return None
    keys = [blocks for _, _, blocks in rows]
    numbers = [len(one.starts) for one in keys]
    return RerotatedKeys(
        np.repeat(np.asarray([row for row, _, _ in rows], dtype=np.int64), numbers),
        np.repeat(np.asarray([source for _, source, _ in rows], dtype=np.int64), numbers),
        np.concatenate([one.starts for one in keys]) // page_size,
        np.concatenate([one.lengths for one in keys]),
        np.concatenate([one.rotate_by for one in keys]),
    )


def divide(keys: KeyRanges, span: tuple[int, int]) -> tuple[KeyRanges, KeyRanges]:
    """Return the parts of ranges that lie outside of a span, and those inside."""
    first, last = span
    outside = [piece for start, stop in keys for piece in ((start, min(stop, first)), (max(start, last), stop))]
    inside = [(max(start, first), min(stop, last)) for start, stop in keys]

    def kept(pieces: list[tuple[int, int]]) -> KeyRanges:
        return tuple((start, stop) for start, stop in pieces if start < stop)

    return kept(outside), kept(inside)


def _page_columns(keys: KeyRanges, page_size: int) -> np.ndarray:
    return np.concatenate([np.arange(start // page_size, -(-stop // page_size)) for start, stop in keys])


class Batch(NamedTuple):
    """The rows of a batch: their plans, and the other arguments of ``split_rows``.

    Attributes:
        request_ids: ids of the rows that are no padding.
        absent: positions ``[first, stop)`` of each row whose keys are not here, or None if all are here.
    """

    request_ids: list[str]
    plans: list[StarPlan | None]
    query_lens: list[int]
    seq_lens: list[int]
    absent: list[tuple[int, int] | None]

    def split(self, page_size: int, seen: Callable[[StarPlan], StarPlan | None] | None = None) -> VirtualRows | None:
        """Return the virtual rows for pages of ``page_size`` tokens, or None if no row lies in star blocks.

        Args:
            seen: function from a row's plan to the plan it follows, or None for dense rows; by default its own.
        """
        plans = self.plans
        if seen is not None:
            plans = [None if plan is None else seen(plan) for plan in plans]
        return split_rows(plans, self.query_lens, self.seq_lens, page_size, self.absent)
