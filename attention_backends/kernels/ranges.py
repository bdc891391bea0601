"""The table of tokens that attend to ranges of keys, each rotated back for each range.

A row of the table is the end of a batch row: its last ``queries`` tokens of the step. Batch row b has the tokens
``query_start_loc[b]`` to ``query_start_loc[b + 1]`` and ``seq_lens[b]`` keys. Key k is in page
``block_table[b, k // page_size]`` at slot ``k % page_size``. A row has ranges ``[first, stop)`` of k. A token sees the
keys of the ranges of its row up to its own key. Before it meets those of a range, it is rotated back by the range's
number of positions. kernels/triton/ranges.py computes the attention over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

TILE_KEYS = 64
"""Keys of a tile of work. Programs have equal numbers of tiles, whatever the ranges' lengths."""

NUM_COUNTS, PLACE_FIELDS, RANGE_FIELDS = 2, 5, 4


@dataclass(frozen=True, eq=False)
class TokenRanges:
    """The rows of a step on the host, R of them, with N ranges.

    Attributes:
        rows: (R,) int64, the batch row of each.
        queries: (R,) int64, its tokens, at least 1.
        row: (N,) int64, ascending: which of ``rows`` a range is of. Each has a range.
        first, stop: (N,) int64, the range's keys; it has at least one.
        rotate_by: (N,) int64, by how many positions the tokens are rotated back, at least 0.
    """

    rows: np.ndarray
    queries: np.ndarray
    row: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    rotate_by: np.ndarray

    def packed(self, tile_queries: int, max_places: int | None = None) -> np.ndarray:
        """Return the numbers that the kernel reads, as int32: counts, places and ranges, one after the other.

        A place is a tile of queries: its batch row, the tokens of the row from its first one on, the tiles of work
        before it, and its ranges, from one number to another. After the last place is the number of tiles. A range is
        first, stop, rotate_by, and the tiles before it in its row. Counts are the number of places and of all tiles.

        Args:
            tile_queries: maximum tokens of a place.
            max_places: number of places to leave room for, or None for no more than there are.
        """
        numbers = np.arange(len(self.rows))
        tiles = -(-(self.stop - self.first) // TILE_KEYS)
        ends = np.cumsum(tiles)
        range_first, range_stop = (np.searchsorted(self.row, numbers, side) for side in ("left", "right"))
        row_start = (ends - tiles)[range_first]
        row_tiles = ends[range_stop - 1] - row_start
        counts = -(-self.queries // tile_queries)
        row = np.repeat(numbers, counts)
        number_in_row = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        work = np.cumsum(row_tiles[row])
        places = np.zeros((1 + (len(row) if max_places is None else max_places), PLACE_FIELDS), dtype=np.int32)
        fields = (
            self.rows[row],
            self.queries[row] - number_in_row * tile_queries,
            work - row_tiles[row],
            range_first[row],
            range_stop[row],
        )
        places[: len(row)] = np.stack(fields, axis=1)
        places[len(row) :, 2] = work[-1] if len(work) else 0
        ranges = np.stack([self.first, self.stop, self.rotate_by, ends - tiles - row_start[self.row]], axis=1)
        header = np.asarray([len(row), places[-1, 2]])
        return np.concatenate([header, places.ravel(), ranges.ravel()]).astype(np.int32)


def packed_size(max_places: int, max_ranges: int) -> int:
    """Return the number of elements of a table with room for ``max_places`` places and ``max_ranges`` ranges."""
    return NUM_COUNTS + PLACE_FIELDS * (max_places + 1) + RANGE_FIELDS * max_ranges


@dataclass(frozen=True, eq=False)
class RangeTable:
    """The rows of a step on the device, and the batch that they are of.

    Attributes:
        numbers: int32, what ``TokenRanges.packed`` returns, and anything behind it.
        max_places: how many places it has room for.
        tile_queries: tokens of a place at most.
        block_table: (B, C) int32, of the batch.
        query_start_loc: (B + 1,) int32.
        seq_lens: (B,) int32.
    """

    numbers: torch.Tensor
    max_places: int
    tile_queries: int
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def offsets(self) -> tuple[int, int]:
        """Return the offsets of the places and of the ranges in ``numbers``."""
        return NUM_COUNTS, packed_size(self.max_places, 0)


def make_range_table(
    ranges: TokenRanges,
    tile_queries: int,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> RangeTable:
    """Make the table of one step, with one copy to the device."""
    packed = ranges.packed(tile_queries)
    numbers = async_tensor_h2d(packed, block_table.device)
    return RangeTable(numbers, int(packed[0]), tile_queries, block_table, query_start_loc, seq_lens)
