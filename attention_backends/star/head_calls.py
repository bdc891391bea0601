"""vLLM's attention for layers some of whose heads see everything: one call for each run of heads of one kind.

A call has slices by head of the query, of the cache and of the output. None of them is copied, except for the output of
the backends in ``CONTIGUOUS_OUTPUT``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionType, CommonAttentionMetadata

from starling.attention_backends.star.head_step import HeadCall
from starling.vllm_compat.attention_splits import build_unsplit
from starling.vllm_compat.head_attention import (
    builder_of_heads,
    builder_of_other_rows,
    has_scales_by_head,
    impl_of_heads,
)
from starling.vllm_compat.patching import touches

CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
"""Those where a head's part of a cache is a slice of it, as vLLM's options name them."""

CONTIGUOUS_OUTPUT = ("CPU_ATTN", "FLASHINFER")
"""The backends that take the heads of an output to be next to one another, whatever its strides."""


@touches("vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.{alibi_slopes, sliding_window}")
def unsupported_reason(layer: Any) -> str | None:
    """Return the reason why an attention layer's heads can't be computed in several calls, or None if they can."""
    impl, dtype = layer.impl, layer.kv_cache_dtype
    for refused, reason in (
        (layer.attn_type != AttentionType.DECODER, "its attention is not a decoder's"),
        (impl.alibi_slopes is not None, "it has ALiBi slopes"),
        (impl.sliding_window not in (-1, (-1, -1)), "it has a sliding window"),
        (dtype not in CACHE_DTYPES, f"its cache is {dtype}, of which a slice by head is not known"),
        (has_scales_by_head(layer), "its cache has a scale for each head"),
    ):
        if refused:
            return reason
    return None


class HeadBuilders:
    """A backend's metadata builders for calls on some heads of its layers, made when they are first needed.

    One of FlashInfer's takes 8 MiB of the GPU's memory, where it has a plan, and those for each further kind of heads
    share a list of as many pages as the rows of a step may have.

    Args:
        backend: vLLM's name of the backend.
        base: vLLM's class of metadata builders.
        builder: one of it, for all heads of the layers.
    """

    def __init__(self, backend: str, base: Any, builder: Any) -> None:
        self.backend, self.base = backend, base
        self.by_rows = [builder]
        self.by_heads: dict[tuple[int, int], Any] = {}

    def build(self, place: int, num_kv_heads: int, rows: CommonAttentionMetadata) -> Any:
        """Build the backend's metadata for calls on ``num_kv_heads`` KV heads.

        Args:
            place: index of these rows among those of the step; 0: the builder for all heads builds for the same rows.
            rows: the step's tokens in rows.
        """
        while place >= len(self.by_rows):
            self.by_rows.append(builder_of_other_rows(self.backend, self.by_rows[0]))
        key = place, num_kv_heads
        if key not in self.by_heads:
            self.by_heads[key] = builder_of_heads(self.backend, self.by_rows[place], num_kv_heads)
        builder = self.by_heads[key]
        of_rows = functools.partial(self.base.build, builder, 0, rows)
        return build_unsplit(self.backend, builder, rows.num_actual_tokens, of_rows)


def attend_by_heads(
    base: type[AttentionImpl],
    backend: str,
    impl: Any,
    calls: Sequence[HeadCall],
    num_tokens: int,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Write the attention of a layer to ``output`` by a call of vLLM's implementation for each run of its heads.

    Args:
        base: vLLM's class, of which ``impl`` is one.
        backend: vLLM's name of the backend.
        calls: the runs of heads, with the backend's metadata for each.
        num_tokens: of the step; what is behind them in ``output`` is padding.
        kv_cache: (pages, KV heads, page size, 2 * head size).
        layer, query, key, value, output: as those of vLLM's method, as are further arguments.
    """
    group, shape = impl.num_heads // impl.num_kv_heads, (-1, impl.num_heads, impl.head_size)
    whole = query.view(shape), output.view(shape)
    for first, stop, metadata in calls:
        queries, out = (tensor[:, first * group : stop * group] for tensor in whole)
        written = out.new_empty(out.shape) if backend in CONTIGUOUS_OUTPUT and not out.is_contiguous() else out
        part, cache = impl_of_heads(impl, first, stop), kv_cache[:, first:stop]
        base.forward(part, layer, queries, key, value, cache, metadata, written, *args, **kwargs)
        if written is not out:
            out[:num_tokens].copy_(written[:num_tokens])
