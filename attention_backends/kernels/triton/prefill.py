"""Paged prefill and extend in Triton: one program per query tile and KV head, over all keys that its queries see."""

from __future__ import annotations

import torch

from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.triton.launch import launch

LANES = 128


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py; raises ValueError for operands that ``launch`` refuses."""
    out, lse = operands.make_out(), operands.make_lse()
    launch(operands, out[None], lse[None], LANES)
    return out, lse
