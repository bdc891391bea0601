"""Attention of query and output over blocks with positions of their own: each query is turned for each block.

A rotary embedding turns a pair of a query's or key's elements by an angle for each position, and a score depends on the
difference of the two angles (arXiv 2104.09864, section 3.4.2). So keys that were computed at other positions than they
stand at are met at their true distance by a query that is turned back by the difference. Keys are neither changed nor
copied. Each pair of a query token and a block is a row of paged attention without a causal mask. The rows' results are
merged by their log-sum-exp.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.utils.torch_utils import async_tensor_h2d

from starling.attention_backends.kernels.contract import Layout, Operands
from starling.attention_backends.kernels.dispatch import paged_attention
from starling.attention_backends.kernels.merge import PartTokens
from starling.attention_backends.kernels.rotary import Rotation
from starling.attention_backends.kernels.turned import TurnedQueries, add_turned_attention, turned_attention
from starling.attention_backends.star.rows import TurnedKeys

MAX_TOKENS = {"cpu": 512, "cuda": 8192}
"""Turned query tokens that one call has on a device, or those of a single row and block where these are more.

The tensors of so few tokens stay in a CPU's cache. With 8,192 tokens a call, a step of 512 query tokens and 128 blocks
took 2.7 times as long.
"""

MAX_KEYS = {"cuda": 4096}
"""Keys that a row has at most in a step of decodes, by device. A longer row is divided, and its parts are merged.

One program of a GPU reads the keys of a row and a KV head. The kernel divides rows only where there are too few of them
to fill the card. So beside many short rows, one program would read all of a long one, and the step would wait for it.
A CPU's op divides rows itself.
"""


@dataclass(frozen=True, eq=False)
class TurnedRows:
    """Rows of one call, R of them, with T query tokens.

    Attributes:
        num_keys: (R,) int64, on the host: ``seq_lens``, or upper bounds of them.
        tokens: (T,) int64, numbers of the step's query tokens; a token is there once for each of its blocks.
        turns: (T,) int64, by how many positions each is turned back.
        block_table: (R, C) int32.
        query_start_loc: (R + 1,) int32.
        seq_lens: (R,) int32.
    """

    num_keys: np.ndarray
    tokens: torch.Tensor
    turns: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    @functools.cached_property
    def part_tokens(self) -> PartTokens:
        """``tokens``, one object for all layers, which so share their order."""
        return PartTokens(self.tokens)

    def operands(self, query: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], **options: Any) -> Operands:
        """The operands of the call for a layer's query (tokens, heads, head size) and caches."""
        return Operands(query, *caches, self.block_table, self.query_start_loc, self.seq_lens, **options)


def make_turned_rows(
    turned: TurnedKeys, starts: np.ndarray, query_lens: np.ndarray, block_table: torch.Tensor, page_size: int
) -> Iterator[TurnedRows]:
    """The calls by which queries attend to blocks with positions of their own.

    Args:
        starts, query_lens: (R,) int64, first query token of each virtual row, and their number.
        block_table: (batch rows, columns) int32.
        page_size: tokens of a page of it.
    """
    queries = query_lens[turned.row]
    calls = (np.cumsum(queries) - 1) // MAX_TOKENS[block_table.device.type]
    for first, stop in _runs(calls):
        yield _one_call(turned, slice(first, stop), starts, queries, block_table, page_size)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """The ranges of equal neighbours."""
    borders = np.flatnonzero(np.diff(values)) + 1
    if len(values):
        yield from zip([0, *borders.tolist()], [*borders.tolist(), len(values)], strict=True)


def _one_call(
    turned: TurnedKeys,
    part: slice,
    starts: np.ndarray,
    queries: np.ndarray,
    block_table: torch.Tensor,
    page_size: int,
) -> TurnedRows:
    lens, keys, device = queries[part], turned.num_keys[part], block_table.device
    own_starts = np.concatenate(([0], np.cumsum(lens)))
    # Token i of the call is query token i - own_starts[its row] of the row, and so on the step's.
    tokens = np.arange(own_starts[-1]) + np.repeat(starts[turned.row[part]] - own_starts[:-1], lens)
    columns = np.arange(-(-int(keys.max()) // page_size))
    # Columns behind a row's keys are not read, but must be in the table.
    pages = np.minimum(turned.first_page[part][:, None] + columns, block_table.shape[1] - 1)
    source = async_tensor_h2d(turned.source[part], device)

    def on_device(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return async_tensor_h2d(values, device, dtype)

    return TurnedRows(
        keys,
        on_device(tokens, torch.int64),
        on_device(np.repeat(turned.turn[part], lens), torch.int64),
        block_table[source[:, None], on_device(pages, torch.int64)].to(torch.int32),
        on_device(own_starts, torch.int32),
        on_device(keys, torch.int32),
    )


def add_rows(
    calls: Iterable[TurnedRows],
    rotation: Rotation,
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    **options: Any,
) -> None:
    """Add the keys of these calls to the attention over all other keys.

    Args:
        query: (tokens, heads, head size), turned to the positions of its tokens.
        caches: the layer's key and value cache.
        out: (tokens, heads, value size) float32, changed in place.
        lse: (tokens, heads) float32, changed in place.
        options: further Operands: ``scale``, ``layout`` and the like.
    """
    for rows in calls:
        queries = TurnedQueries(rows.part_tokens, rows.turns, rotation)
        add_turned_attention(rows.operands(query, caches, **options), queries, out, lse)


@dataclass(frozen=True, eq=False)
class OwnRows:
    """The step's virtual rows that see such blocks, R of them: what their tokens see beside these blocks.

    Attributes:
        num_tokens: their query tokens, without those that pad a CUDA graph.
        are_decodes: whether each of them has one query token.
        page_size: tokens of a page.
        num_keys: (R,) int64, on the host: ``seq_lens``, or upper bounds of them.
        block_table: (R, C) int32.
        query_start_loc: (R + 1,) int32.
        seq_lens: (R,) int32.
    """

    num_tokens: int
    are_decodes: bool
    page_size: int
    num_keys: np.ndarray
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor


def with_own_rows(own: OwnRows, rows: TurnedRows) -> TurnedRows:
    """The rows of one call, and before them the step's own, each of one token; the own ones are not turned.

    Rows of more than ``MAX_KEYS`` keys are divided.
    """
    device, own_tokens = rows.tokens.device, torch.arange(own.num_tokens, device=rows.tokens.device)
    num_keys = np.concatenate((own.num_keys[: own.num_tokens], rows.num_keys))
    whole = -(-int(num_keys.max()) // own.page_size)
    pages = max(1, MAX_KEYS[device.type] // own.page_size) if device.type in MAX_KEYS else whole
    of_own, of_others = (
        _divided(table, lens, keys, pages, own.page_size)
        for table, lens, keys in (
            (own.block_table, own.seq_lens, own.num_keys[: own.num_tokens]),
            (rows.block_table, rows.seq_lens, rows.num_keys),
        )
    )
    width = max(of_own.block_table.shape[1], of_others.block_table.shape[1])
    tables = (pad(part.block_table, (0, width - part.block_table.shape[1])) for part in (of_own, of_others))
    tokens = torch.cat((own_tokens[of_own.row], rows.tokens[of_others.row]))
    return TurnedRows(
        np.concatenate((of_own.num_keys, of_others.num_keys)),
        tokens,
        torch.cat((torch.zeros_like(of_own.row), rows.turns[of_others.row])),
        torch.cat(tuple(tables)),
        torch.arange(len(tokens) + 1, dtype=torch.int32, device=device),
        torch.cat((of_own.seq_lens, of_others.seq_lens)),
    )


class _Parts(NamedTuple):
    """P parts of rows: the row of each (P,) int64, its keys on the host (P,), its pages (P, C) and its keys (P,)."""

    row: torch.Tensor
    num_keys: np.ndarray
    block_table: torch.Tensor
    seq_lens: torch.Tensor


def _divided(
    block_table: torch.Tensor, seq_lens: torch.Tensor, num_keys: np.ndarray, pages: int, page_size: int
) -> _Parts:
    """Divide rows into parts of so many pages; the last part of a row has what is left.

    Args:
        block_table, seq_lens: of the rows, (R, C) and (R,), and of padding behind them.
        num_keys: (R,) int64, ``seq_lens`` or upper bounds; a part may have no key where they are above.
    """
    counts = np.maximum(1, -(-num_keys // (pages * page_size)))
    row = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)) * pages
    keys = np.minimum(num_keys[row] - first * page_size, pages * page_size)
    columns = np.arange(-(-int(keys.max()) // page_size))
    # Columns behind a part's keys are not read, but must be in the table.
    columns = np.minimum(first[:, None] + columns, block_table.shape[1] - 1)
    on_device = async_tensor_h2d(row, block_table.device)
    table = block_table[on_device[:, None], async_tensor_h2d(columns, block_table.device)]
    before = async_tensor_h2d(first * page_size, block_table.device)
    lens = (seq_lens[on_device] - before).clamp(0, pages * page_size)
    return _Parts(on_device, keys, table.to(torch.int32), lens.to(torch.int32))


class StepTokens:
    """The tokens of a step's rows that see blocks with positions of their own; the step has others too.

    Args:
        starts, query_lens: (R,) int64, first token of each of these rows in the step, and their number.
        num_tokens: of the step.
    """

    def __init__(self, starts: np.ndarray, query_lens: np.ndarray, num_tokens: int, device: torch.device) -> None:
        offsets = np.cumsum(query_lens) - query_lens
        numbers = np.arange(query_lens.sum()) + np.repeat(starts - offsets, query_lens)
        places = np.full(num_tokens, -1)
        places[numbers] = np.arange(len(numbers))
        self.numbers = async_tensor_h2d(numbers, device)
        self.places = async_tensor_h2d(np.maximum(places, 0), device)
        self.are_here = async_tensor_h2d(places >= 0, device)

    def put(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write ``part`` (these tokens, ...) to their places in ``whole`` (the step's tokens and padding, ...)."""
        whole = whole[: len(self.places)]
        mask = self.are_here.view(-1, *[1] * (whole.dim() - 1))
        whole.copy_(torch.where(mask, part[self.places].to(whole.dtype), whole))


class TurnedAttention:
    """The attention of one step over blocks with positions of their own.

    In a step of decodes, all rows are one call, and the layers share the angles.

    Args:
        own: the step's virtual rows that see such blocks.
        rows: the calls; their tokens are numbers of those of ``own``.
        rotations: layer name -> its rotary embedding.
        tokens: the tokens of ``own``; None: they are all of the step's.
    """

    def __init__(
        self, own: OwnRows, rows: list[TurnedRows], rotations: Mapping[str, Rotation], tokens: StepTokens | None = None
    ) -> None:
        self.own = own
        self.rows = rows
        self.rotations = rotations
        self.tokens = tokens
        self.decodes = with_own_rows(own, rows[0]) if own.are_decodes and len(rows) == 1 else None
        self._queries: dict[int, TurnedQueries] = {}

    def attend(
        self,
        layer: str,
        query: torch.Tensor,
        out: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        layout: Layout,
        **options: Any,
    ) -> None:
        """Write the attention over all keys to the tokens of ``own`` in ``out``.

        The arguments are those of ``add``, with padding at the end.
        """
        own = self.own
        if self.tokens is None:
            query, written = query[: own.num_tokens], out[: own.num_tokens]
        else:
            query = query[self.tokens.numbers]
            written = out.new_empty((own.num_tokens, *out.shape[1:]))
        if self.decodes is not None:
            operands = self.decodes.operands(query, caches, out=written, layout=layout, **options)
            turned_attention(operands, self._queries_of_decodes(self.decodes, self.rotations[layer]))
        else:
            rows = own.block_table, own.query_start_loc, own.seq_lens
            _, lse = paged_attention(Operands(query, *caches, *rows, out=written, layout=layout, **options))
            written.copy_(self._added(layer, query, written, lse, caches, layout=layout, **options))
        if self.tokens is not None:
            self.tokens.put(written, out)

    def add(
        self,
        layer: str,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        layout: Layout,
        **options: Any,
    ) -> None:
        """Add the blocks' keys to the attention over all other keys.

        Args:
            layer: name of the layer.
            query: (tokens, heads, head size) of the step, turned to the positions of its tokens.
            out: (tokens, heads, value size) of the step, changed in place.
            lse: (tokens, heads) of the step, changed in place.
            caches: the layer's key and value cache, in ``layout``.
            options: further Operands: ``scale``, ``softcap`` and the like.
        """
        if self.tokens is None:
            out.copy_(self._added(layer, query, out, lse, caches, layout=layout, **options))
            return
        numbers = self.tokens.numbers
        part = lse[numbers]
        wide = self._added(layer, query[numbers], out[numbers], part, caches, layout=layout, **options)
        self.tokens.put(wide, out)
        self.tokens.put(part, lse)

    def _added(
        self,
        layer: str,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        **options: Any,
    ) -> torch.Tensor:
        """``out`` with the blocks' keys, in float32, to be rounded once; ``lse`` is changed in place."""
        wide = out.float()
        add_rows(self.rows, self.rotations[layer], query, caches, wide, lse, **options)
        return wide

    def _queries_of_decodes(self, rows: TurnedRows, rotation: Rotation) -> TurnedQueries:
        """The turned queries of a step of decodes, one object for all layers, which so share the angles.

        The angles of all calls of other steps would take 4 R bytes for each query token and block: 260 MB for 512
        tokens, 2,000 blocks and R = 64.
        """
        if id(rotation) not in self._queries:
            self._queries[id(rotation)] = TurnedQueries(rows.part_tokens, rows.turns, rotation)
        return self._queries[id(rotation)]
