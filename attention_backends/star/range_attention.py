"""The attention of a step's tokens that see blocks with positions of their own, as layers compute it on a GPU.

All keys that a token sees are ranges of its batch row, met by queries that are turned back: turned_rows.py says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.kernels.dispatch import attend_in_ranges
from starling.attention_backends.kernels.ranges import RangeTable, TokenRanges, make_range_table
from starling.attention_backends.kernels.rotary import Rotation
from starling.attention_backends.star.rows import VirtualRows


def make_token_ranges(rows: VirtualRows, chosen: np.ndarray, page_size: int) -> TokenRanges:
    """All keys of some virtual rows, in the positions of their batch rows: their own, and those of turned blocks.

    Args:
        chosen: (R,) int64, ascending, the virtual rows. Each is the end of its batch row.
        page_size: tokens of a page.
    """
    own = rows.key_ranges[np.isin(rows.key_ranges[:, 0], chosen)]
    row, first, stop, turn = *own.T, np.zeros(len(own), dtype=np.int64)
    if rows.turned is not None:
        of_chosen = np.isin(rows.turned.row, chosen)
        starts = rows.turned.first_page[of_chosen] * page_size
        row = np.concatenate((row, rows.turned.row[of_chosen]))
        first = np.concatenate((first, starts))
        stop = np.concatenate((stop, starts + rows.turned.num_keys[of_chosen]))
        turn = np.concatenate((turn, rows.turned.turn[of_chosen]))
    order = np.argsort(row, kind="stable")
    numbers = np.searchsorted(chosen, row[order])
    return TokenRanges(rows.source[chosen], rows.query_lens[chosen], numbers, first[order], stop[order], turn[order])


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
            query: (tokens, heads, head size) of the step, turned to the positions of its tokens.
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
    assert rows.turned is not None
    numbers = np.unique(rows.turned.row)
    query_lens = rows.query_lens[numbers]
    tensors = batch.block_table_tensor, batch.query_start_loc, batch.seq_lens
    tables = [
        make_range_table(make_token_ranges(rows, chosen, page_size), tile, *tensors)
        for chosen, tile in ((numbers[query_lens == 1], 1), (numbers[query_lens > 1], tile_queries))
        if len(chosen)
    ]
    return RangeAttention(tables, int(query_lens.sum()) == int(rows.query_lens.sum()))
