"""The contract on any device: the CPU's implementation for CPU tensors, Triton's for all others."""

from __future__ import annotations

import torch

from starling.attention_backends.kernels import devices
from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.cpu import attention as cpu


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the contract of contract.py on the device of the query.

    Raises:
        ValueError: the implementation for this device does not support the operands.
    """
    if not devices.uses_triton(operands.query.device):
        return cpu.paged_attention(operands)
    from starling.attention_backends.kernels.triton import (
        attention as triton,  # imports Triton, which a CPU does not need
    )

    return triton.paged_attention(operands)
