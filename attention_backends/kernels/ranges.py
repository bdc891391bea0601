"""The table of a step in which single query tokens attend to ranges of keys, each turned back for each range.

Token ``query_start_loc[b]`` is that of batch row b. Its keys are in ranges ``[first, stop)`` of the row's positions:
key k is in page ``block_table[b, k // page_size]`` at slot ``k % page_size``, where k is below ``seq_lens[b]``. Before
it meets the keys of a range, the token is turned back by the range's number of positions. The token has the attention
over the keys of all its ranges. kernels/triton/ranges.py computes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

TILE_KEYS = 64
"""Keys of a tile of work. Programs have equal numbers of tiles, whatever the ranges' lengths."""

NUM_COUNTS, ROW_FIELDS, RANGE_FIELDS = 4, 2, 5


@dataclass(frozen=True, eq=False)
class TokenRanges:
    """The ranges of a step on the host: R tokens, N ranges.

    Attributes:
        rows: (R,) int64, the batch row of each token.
        place: (N,) int64, ascending: which of ``rows`` a range is of. Each has a range.
        first, stop: (N,) int64, the range's keys; it has at least one.
        turn: (N,) int64, by how many positions the token is turned back, at least 0.
    """

    rows: np.ndarray
    place: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    turn: np.ndarray

    def packed(self, max_rows: int) -> np.ndarray:
        """The numbers that the kernel reads, as int32: counts, rows and ranges, one behind the other.

        Counts are N, R, the tiles of all ranges, and 0. A row has its batch row and the tiles before it; behind the
        last one are the tiles of all. A range has place, first, stop, turn, and the tiles before it.

        Args:
            max_rows: how many rows there is room for.
        """
        tiles = -(-(self.stop - self.first) // TILE_KEYS)
        before = np.cumsum(tiles) - tiles
        total = int(tiles.sum())
        rows = np.zeros((max_rows + 1, ROW_FIELDS), dtype=np.int32)
        rows[: len(self.rows), 0] = self.rows
        rows[: len(self.rows), 1] = before[np.searchsorted(self.place, np.arange(len(self.rows)))]
        rows[len(self.rows) :, 1] = total
        ranges = np.stack([self.place, self.first, self.stop, self.turn, before], axis=1)
        counts = [len(self.place), len(self.rows), total, 0]
        return np.concatenate([np.asarray(counts), rows.ravel(), ranges.ravel()]).astype(np.int32)


def packed_size(max_rows: int, max_ranges: int) -> int:
    """The numbers of a table with room for so many rows and ranges."""
    return NUM_COUNTS + ROW_FIELDS * (max_rows + 1) + RANGE_FIELDS * max_ranges


@dataclass(frozen=True, eq=False)
class RangeTable:
    """The ranges of a step on the device, and the batch that they are of.

    Attributes:
        numbers: int32, what ``TokenRanges.packed`` returns, and anything behind it.
        max_rows: how many rows it has room for.
        block_table: (B, C) int32, of the batch.
        query_start_loc: (B + 1,) int32.
        seq_lens: (B,) int32.
    """

    numbers: torch.Tensor
    max_rows: int
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def offsets(self) -> tuple[int, int]:
        """Where in ``numbers`` the rows and the ranges begin."""
        return NUM_COUNTS, packed_size(self.max_rows, 0)


def make_range_table(
    ranges: TokenRanges, block_table: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor
) -> RangeTable:
    """The table of one step, by one copy to the device."""
    numbers = async_tensor_h2d(ranges.packed(len(ranges.rows)), block_table.device)
    return RangeTable(numbers, len(ranges.rows), block_table, query_start_loc, seq_lens)
