"""Runs the kernels of steps over documents before the first request, on a GPU.

Triton compiles a kernel when it is first called, which takes seconds. vLLM 0.33 can make it an error in serving
(``--jit-monitor-mode error``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from starling.attention_backends.kernels.contract import Sizes
from starling.attention_backends.kernels.ranges import RangeTable, TokenRanges, make_range_table
from starling.attention_backends.kernels.triton.ranges import prefill_tile_queries
from starling.attention_backends.star.range_attention import RangeAttention
from starling.vllm_compat.patching import touches


@touches(
    "vllm.model_executor.layers.attention.Attention.kv_cache",
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.{num_heads, head_size, logits_soft_cap}",
)
@torch.inference_mode()
def warm_up(layers: Iterable[Any]) -> None:
    """Run each kernel that a step over documents can need, once for each kind of layer.

    Args:
        layers: vLLM's attention layers whose implementation turns queries, with their KV caches bound. Page 0 of a
            cache is read; no page is written.
    """
    seen = set()
    for layer in layers:
        impl, cache = layer.impl, layer.kv_cache
        kind = impl.num_heads, impl.head_size, bool(impl.logits_soft_cap), cache.shape, cache.stride(), cache.dtype
        if kind in seen:
            continue
        seen.add(kind)
        kv_heads, page_size = cache.shape[1:3]
        sizes = Sizes(1, 1, impl.num_heads, kv_heads, impl.head_size, impl.head_size, page_size)
        for tile_queries in (1, prefill_tile_queries(sizes, cache.element_size())):
            query = torch.zeros(1, impl.num_heads * impl.head_size, dtype=cache.dtype, device=cache.device)
            table = _table(tile_queries, cache.device)
            impl.attend_turned(query, cache, torch.empty_like(query), RangeAttention([table]))


def _table(tile_queries: int, device: torch.device) -> RangeTable:
    """Make the table of one token that sees itself, in page 0."""
    ones, zeros = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    places = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    ranges = TokenRanges(zeros, ones, zeros, zeros, ones, zeros)
    return make_range_table(ranges, tile_queries, places[:, :1], places[0], places[0, 1:])
