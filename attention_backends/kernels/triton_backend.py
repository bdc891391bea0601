"""Paged attention in Triton: the kernel for decode where a batch is decode, else that for prefill."""

from __future__ import annotations

from typing import Any

import torch

from attention_backends.kernels import triton_decode, triton_prefill

QUERIES_OF_A_DECODE_ROW = 8


def is_decode(tokens: int, rows: int) -> bool:
    """Whether a batch's rows have few enough queries, on average, to be split by keys; decode may guess some ahead.

    Both kernels are right for either. Only the average is known without reading a tensor back from the device.
    """
    return tokens <= QUERIES_OF_A_DECODE_ROW * rows


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of contract.py; reads no tensor on the host, so a CUDA graph can hold it."""
    kernel = triton_decode if is_decode(len(query), len(seq_lens)) else triton_prefill
    return kernel.paged_attention(query, key_cache, value_cache, block_table, query_start_loc, seq_lens, **options)
