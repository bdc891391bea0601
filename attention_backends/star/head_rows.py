"""Rows of a step in which some KV heads see everything: each head is computed in rows of its own kind.

A plan's dense heads are those with the highest scores, so a plan with more of them has all those of a plan with fewer.
Where the plans of a step have N numbers of dense heads, there are N + 1 kinds of heads: those that are dense for all of
these plans come first, those that are dense for none last. For each kind the step's tokens stand in other rows: in the
batch's own for the plans for which these heads are dense, in virtual ones for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata


def kinds_of_heads(counts: Sequence[int] | np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(KV heads,) int64, the kind of each head of a layer.

    Args:
        counts: (N,), the numbers of dense heads of the step's plans, ascending.
        ranks: (KV heads,) int64, the places of the layer's heads in the order of scores.
    """
    return np.searchsorted(counts, ranks, side="right")


class HeadRun(NamedTuple):
    """KV heads of a layer, one behind another, that are of one kind: ``[first, stop)``."""

    first: int
    stop: int
    kind: int


def head_runs(counts: Sequence[int], ranks: np.ndarray) -> list[HeadRun] | None:
    """Return a layer's heads in as few runs of one kind as there are, or None if no head of the layer is dense.

    Args:
        counts, ranks: see ``kinds_of_heads``.
    """
    kinds = kinds_of_heads(counts, ranks)
    if (kinds == len(counts)).all():
        return None
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return [HeadRun(first, stop, int(kinds[first])) for first, stop in pairwise(borders)]


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The rows of all kinds of heads, one kind after the other; R of them, over T query tokens.

    Attributes:
        counts: (N,) int64, the numbers of dense heads of the step's plans, ascending.
        kinds: (R,) int64, which kind of heads a row computes.
        block_table: (R, C) int32.
        query_start_loc: (R + 1,) int32, to (N + 1) T: each kind goes over all tokens.
        seq_lens: (R,) int32.
    """

    counts: np.ndarray
    kinds: np.ndarray
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    def row_heads(self, ranks: np.ndarray) -> torch.Tensor:
        """(R, KV heads) bool, the heads that each row computes in a layer.

        Args:
            ranks: (KV heads,) int64, the places of the layer's heads in the order of scores.
        """
        kinds = kinds_of_heads(self.counts, ranks)
        return async_tensor_h2d(self.kinds[:, None] == kinds[None, :], self.seq_lens.device)


def make_head_rows(counts: Sequence[int], kinds: Sequence[CommonAttentionMetadata]) -> HeadRows:
    """Make the rows of all kinds of heads.

    Args:
        counts: the numbers of dense heads, ascending.
        kinds: the metadata of the step's tokens for each kind of heads.
    """
    tokens = int(kinds[0].query_start_loc_cpu[kinds[0].num_reqs])
    starts = [one.query_start_loc[1 : one.num_reqs + 1] + number * tokens for number, one in enumerate(kinds)]
    return HeadRows(
        np.asarray(counts, dtype=np.int64),
        np.repeat(np.arange(len(kinds)), [one.num_reqs for one in kinds]),
        torch.cat([one.block_table_tensor[: one.num_reqs] for one in kinds]),
        torch.cat([kinds[0].query_start_loc[:1], *starts]),
        torch.cat([one.seq_lens[: one.num_reqs] for one in kinds]),
    )
