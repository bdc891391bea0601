"""Paged attention on any device: the CPU's implementation for CPU tensors, Triton's for all others.

    paged_attention(operands)
    rerotated_attention(operands, rerotated)            add_rerotated_attention(operands, rerotated, out, lse)

The operands are defined by contract.py. For re-rotated queries ``query_start_loc`` divides P query tokens among the
rows: token i of them is token ``tokens[i]`` of ``query``, rotated back by ``rotate_by[i]`` positions. A token of the
query has the attention over the keys of all its rows, which are merged by their log-sum-exp. Every query token of a row
sees all of the row's keys.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from starling.attention_backends.kernels import contract
from starling.attention_backends.kernels.contract import Operands, Rotation, rotate_back
from starling.attention_backends.kernels.cpu import paged_op as cpu
from starling.attention_backends.kernels.merge import merge_parts, merge_rows
from starling.attention_backends.kernels.ranges import RangeTable


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py on the device of the query.

    Raises:
        ValueError: the implementation for this device does not support the operands.
    """
    if not contract.uses_triton(operands.query.device):
        return cpu.paged_attention(operands)
    from starling.attention_backends.kernels.triton import paged as triton  # imports Triton, which a CPU does not need

    return triton.paged_attention(operands)


def attend_in_ranges(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    table: RangeTable,
    rotation: Rotation,
    out: torch.Tensor,
    **options: Any,
) -> None:
    """Attention of tokens over ranges of keys, on a GPU; arguments as of kernels/triton/ranges.py."""
    from starling.attention_backends.kernels.triton.ranges import attend_ranges

    attend_ranges(query, caches, table, rotation, out, **options)


@dataclass(frozen=True, eq=False)
class RerotatedQueries:
    """The query tokens of all rows, P of them, and how they are rerotated.

    Attributes:
        tokens: (P,) int64, numbers of tokens of the query.
        rotate_by: (P,) int64, by how many positions each is rotated back, at least 0.
        rotation: of the layer.
    """

    tokens: torch.Tensor
    rotate_by: torch.Tensor
    rotation: Rotation

    @functools.cached_property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines, (P, R / 2) float32 each."""
        return self.rotation.cos[self.rotate_by], self.rotation.sin[self.rotate_by]


def rerotated_attention(operands: Operands, rerotated: RerotatedQueries) -> None:
    """Write the attention of the query's tokens to ``operands.out``, on a CPU. Each token is in a row that has keys.

    Raises:
        ValueError: no implementation for this device supports the operands.
    """
    assert operands.out is not None
    if cpu.has_op_for(operands):
        return cpu.rerotated_attention(
            operands, rerotated.tokens, rerotated.rotate_by, rerotated.rotation, operands.out, None
        )
    merge_parts(*_by_parts(operands, rerotated), rerotated.tokens, operands.out)


def add_rerotated_attention(
    operands: Operands, rerotated: RerotatedQueries, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge the attention into that over other keys.

    Args:
        out: (T, H, Dv) float32, changed in place.
        lse: (T, H) float32, changed in place; -inf where no key was seen.

    Raises:
        ValueError: no implementation for this device supports the operands.
    """
    if cpu.has_op_for(operands):
        return cpu.rerotated_attention(operands, rerotated.tokens, rerotated.rotate_by, rerotated.rotation, out, lse)
    merge_rows(out, lse, rerotated.tokens, *_by_parts(operands, rerotated))


def _by_parts(operands: Operands, rerotated: RerotatedQueries) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention (P, H, Dv) of the rows' queries and its log-sum-exp (P, H), by the operands' own kernel."""
    query = rotate_back(operands.query[rerotated.tokens], *rerotated.angles, rerotated.rotation.is_neox_style)
    return paged_attention(dataclasses.replace(operands, query=query, causal=False, out=None))
