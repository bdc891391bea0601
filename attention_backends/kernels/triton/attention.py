"""Paged attention in Triton: selects the kernel for decode or the kernel for prefill."""

from __future__ import annotations

import torch

from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.triton import decode as triton_decode
from starling.attention_backends.kernels.triton import prefill as triton_prefill

MAX_QUERIES_PER_DECODE_ROW = 8


def is_decode(tokens: int, rows: int) -> bool:
    """Return whether a batch has few enough queries per row, on average, to split the rows by keys.

    The limit leaves room for the draft tokens of speculative decoding. Both kernels are correct for every batch. Only
    the average is known without reading a tensor back from the device.
    """
    return tokens <= MAX_QUERIES_PER_DECODE_ROW * rows


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py without reading a tensor on the host, so that a CUDA graph can capture it.

    Raises:
        ValueError: the kernels, or the card, do not support the operands (see launch.py).
    """
    decode = is_decode(operands.sizes.tokens, operands.sizes.rows)
    return (triton_decode if decode else triton_prefill).paged_attention(operands)
