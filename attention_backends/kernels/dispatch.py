"""The contract on whatever device the operands are on: the C++ op on CPU, Triton elsewhere."""

from __future__ import annotations

from typing import Any

import torch


def paged_attention(query: torch.Tensor, *operands: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """contract.py. Imported at the first call: a CPU has no use for Triton, nor a GPU for a C++ compiler."""
    if query.device.type == "cpu":
        from attention_backends.kernels import cpu

        return cpu.paged_attention(query, *operands, **options)
    from attention_backends.kernels import triton_backend

    return triton_backend.paged_attention(query, *operands, **options)
