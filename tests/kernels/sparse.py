"""Tensors with offsets above 2^31 elements for interpreted kernels, in the pages of a sparse file that are written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from triton.runtime.interpreter import GridExecutor

WIDE_STRIDE = 2**30 + 64
"""A stride that fits 32 bits, and of which two make an offset that does not."""


def spread(rows: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """``rows``, three equal and contiguous tensors, as one tensor whose first stride is WIDE_STRIDE."""
    first = rows[0]
    with tempfile.NamedTemporaryFile() as file:
        size = 2 * WIDE_STRIDE + first.numel()
        file.truncate(size * first.element_size())
        values = torch.from_file(file.name, shared=True, size=size, dtype=first.dtype)
    wide = values.as_strided((3, *first.shape), (WIDE_STRIDE, *first.contiguous().stride()))
    for place, row in zip(wide, rows, strict=True):
        place.copy_(row)
    return wide


def keep_arguments_in_place() -> None:
    """Stop the interpreter from copying whole storages back. It runs CPU tensors in place, so nothing changes."""
    GridExecutor._restore_args_dev = lambda *_: None
