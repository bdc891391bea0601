"""Choice of a kernel's implementation by device."""

from __future__ import annotations

import torch


def uses_triton(device: torch.device) -> bool:
    """Return whether Triton's kernels compute tensors on a device."""
    return device.type != "cpu"
