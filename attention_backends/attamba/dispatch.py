"""The mixers' scan on whatever device its operands are on: plain torch on CPU, Triton elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from attention_backends.attamba import scan


def chunk_scan(projected: torch.Tensor, *operands: Any) -> torch.Tensor:
    """scan.chunk_scan. Triton is imported at the first call that needs it: a CPU has no use for it."""
    if projected.device.type == "cpu":
        return scan.chunk_scan(projected, *operands)
    from attention_backends.attamba import scan_kernel

    return scan_kernel.chunk_scan(projected, *operands)
