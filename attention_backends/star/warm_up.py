"""Runs the kernels of steps over documents before the first request, on a GPU.

Triton compiles a kernel when it is first called, which takes seconds. vLLM 0.33 can make it an error in serving
(``--jit-monitor-mode error``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from starling.attention_backends.kernels.ranges import TokenRanges, make_range_table
from starling.attention_backends.kernels.rotary import Rotation
from starling.attention_backends.kernels.triton.attention import MAX_QUERIES_PER_DECODE_ROW
from starling.attention_backends.kernels.triton.decode import MIN_KEYS_PER_SPLIT, rows_that_fill
from starling.attention_backends.star.turned import TurnedRows
from starling.attention_backends.star.turned_attention import OwnRows, TurnedAttention
from starling.vllm_compat.patching import touches

QUERIES = (2, MAX_QUERIES_PER_DECODE_ROW + 1)
"""Query tokens of a row, of those that do not decode: of steps of few tokens, and of steps of many."""


@touches(
    "vllm.model_executor.layers.attention.Attention.kv_cache",
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.{num_heads, head_size, logits_soft_cap}",
)
@torch.inference_mode()
def warm_up(layers: Iterable[Any], rotations: Mapping[str, Rotation]) -> None:
    """Run each kernel that a step over documents can need, once for each kind of layer.

    Args:
        layers: vLLM's attention layers whose implementation turns queries, with their KV caches bound. Page 0 of a
            cache is read; no page is written.
        rotations: layer name -> its rotary embedding.
    """
    seen = set()
    for layer in layers:
        impl, cache = layer.impl, layer.kv_cache
        kind = impl.num_heads, impl.head_size, bool(impl.logits_soft_cap), cache.shape, cache.stride(), cache.dtype
        if kind in seen:
            continue
        seen.add(kind)
        for num_tokens, turned in _steps(cache, rotations):
            query = torch.zeros(num_tokens, impl.num_heads * impl.head_size, dtype=cache.dtype, device=cache.device)
            impl.attend_turned(layer, query, cache, torch.empty_like(query), turned)


def _steps(cache: torch.Tensor, rotations: Mapping[str, Rotation]) -> Iterator[tuple[int, TurnedAttention]]:
    """Rows of page 0 alone, with their number of tokens: a token that decodes, and others.

    For each number of queries, there are so many others that no row's keys are split, and one whose keys are.

    Args:
        cache: (pages, KV heads, page size, 2 * head size).
    """
    kv_heads, page_size = cache.shape[1:3]
    zeros = torch.zeros(2, 1, dtype=torch.int32, device=cache.device)
    table = make_range_table(
        TokenRanges(*np.zeros((3, 1), int), *np.array([[1], [0]])), zeros[:1], zeros[:, 0], zeros[0]
    )
    yield 1, TurnedAttention(rotations, ranges=table)
    wide = -(-2 * MIN_KEYS_PER_SPLIT // page_size)
    for queries in QUERIES:
        for num_rows, columns in ((rows_that_fill(cache.device, kv_heads), 1), (1, wide)):
            own, rows = _rows(num_rows, queries, columns, cache.device)
            yield own.num_tokens, TurnedAttention(rotations, own, [rows])


def _rows(num_rows: int, queries: int, columns: int, device: torch.device) -> tuple[OwnRows, TurnedRows]:
    """Rows of one key each that may have so many pages: the step's own, and as many of one block."""
    table = torch.zeros(num_rows, columns, dtype=torch.int32, device=device)
    starts = torch.arange(0, num_rows * queries + 1, queries, dtype=torch.int32, device=device)
    lens = torch.ones(num_rows, dtype=torch.int32, device=device)
    tokens = torch.arange(num_rows * queries, device=device)
    own = OwnRows(num_rows * queries, table, starts, lens)
    return own, TurnedRows(tokens, torch.zeros_like(tokens), table, starts, lens)
