"""The contract on any device: the CPU's implementation for CPU tensors, Triton's for all others."""

from __future__ import annotations

from typing import Any

import torch

from starling.attention_backends.kernels import devices
from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.cpu import attention as cpu
from starling.attention_backends.kernels.ranges import RangeTable
from starling.attention_backends.kernels.rotary import Rotation


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py on the device of the query.

    Raises:
        ValueError: the implementation for this device does not support the operands.
    """
    if not devices.uses_triton(operands.query.device):
        return cpu.paged_attention(operands)
    from starling.attention_backends.kernels.triton import (
        attention as triton,  # imports Triton, which a CPU does not need
    )

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
