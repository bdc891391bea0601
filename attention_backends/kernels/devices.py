"""Which implementation of a kernel is a device's."""

from __future__ import annotations

import torch


def uses_triton(device: torch.device) -> bool:
    """Whether tensors on a device are the work of Triton's kernels."""
    return device.type != "cpu"
