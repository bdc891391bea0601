"""vLLM's GPU attention, with what documents and dense heads need of a step.

A row that attends to documents needs the log-sum-exp of its other keys, which vLLM's
implementations do not give: Starling's Triton kernels compute it. Heads that see everything are calls of vLLM's
(head_step.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionImpl

from starling.attention_backends.kernels.contract import Rotation, Sizes
from starling.attention_backends.kernels.ranges import RangeTable, TokenRanges, make_range_table
from starling.attention_backends.star.head_step import attend_by_heads
from starling.attention_backends.star.range_attention import RangeAttention
from starling.attention_backends.star.step import current_step
from starling.vllm_compat.patching import extends, touches


def attends_by_parts(impl: Any) -> bool:
    """Return whether ``make_gpu_impl`` made the class of an attention implementation."""
    return getattr(impl, "attends_by_parts", False)


def rerotates_queries(layer: Any) -> bool:
    """Return whether full CUDA graphs of a layer have Starling's kernels: it has the rotary embedding."""
    impl: Any = getattr(layer, "impl", None)
    return attends_by_parts(impl) and impl.rotation is not None


def keep_for_capture(metadata: Any, table: RangeTable) -> None:
    """Let layers that are captured with this metadata of vLLM's attend to the ranges of a table."""
    metadata.starling_captured = RangeAttention([table])


def unsupported_reason(impl: Any) -> str | None:
    """Return the reason why the kernels can't run a layer, whatever the batch, or None if they can."""
    for refused, reason in (
        (impl.alibi_slopes is not None, "it has ALiBi slopes"),
        (impl.sinks is not None, "it has attention sinks"),
        (impl.kv_cache_dtype.startswith("fp8"), "its cache is fp8"),
    ):
        if refused:
            return reason
    return None


@functools.cache
def make_gpu_impl(base: type[AttentionImpl], backend: str) -> type[AttentionImpl]:
    """Subclass a GPU backend's implementation for caches of shape (pages, KV heads, page size, 2 * head size).

    Args:
        backend: vLLM's name of the backend.
    """

    @extends(AttentionImpl)
    @touches("vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.logits_soft_cap")
    class GpuImpl(base):  # type: ignore[misc, valid-type]
        """Implementation with Starling's kernels for documents and dense heads.

        Attributes:
            rotation: the rotary embedding of the layer if the engine is made for documents; given by the worker.
        """

        attends_by_parts = True
        rotation: Rotation | None = None

        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            return False

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            """Write the attention of a step to ``output`` (tokens, heads, head size) and return it.

            As in vLLM's method, K and V of the step are in the cache already.
            """
            rerotated, calls = getattr(attn_metadata, "starling_captured", None), None
            step = None if attn_metadata is None else current_step()
            if step is not None:
                documents, heads = step.documents, step.heads
                rerotated = rerotated if documents is None else documents.attention(kv_cache.shape[2])
                calls = None if heads is None else heads.calls(layer.layer_name)
            tensors = query, key, value, kv_cache
            if step is not None and calls is not None:
                attend_by_heads(base, backend, self, calls, step.num_tokens, layer, *tensors, output, *args, **kwargs)
            elif rerotated is None or not rerotated.is_whole_step:
                super().forward(layer, *tensors, attn_metadata, output, *args, **kwargs)
            if rerotated is not None:
                self.attend_rerotated(query, kv_cache, output, rerotated)
            return output

        def attend_rerotated(
            self, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor, rerotated: RangeAttention
        ) -> None:
            """Write the attention over documents to ``output`` (tokens, heads, head size)."""
            assert self.rotation is not None
            caches = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            options = {"scale": self.scale, "softcap": self.logits_soft_cap or 0.0}
            shape = (-1, self.num_heads, self.head_size)
            rerotated.attend(self.rotation, query.view(shape), output.view(shape), caches, **options)

    GpuImpl.__name__ = GpuImpl.__qualname__ = f"ByParts{base.__name__}"
    return GpuImpl


@touches(
    "vllm.model_executor.layers.attention.Attention.kv_cache",
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.{num_heads, head_size, logits_soft_cap}",
)
@torch.inference_mode()
def warm_up(layers: Iterable[Any]) -> None:
    """Run each kernel that a step over documents can need, once for each kind of layer.

    Triton compiles a kernel when it is first called, which takes seconds. vLLM can make it an error in serving
    (``--jit-monitor-mode error``).

    Args:
        layers: vLLM's attention layers whose implementation re-rotates queries, with their KV caches bound. Page 0 of a
            cache is read; no page is written.
    """
    from starling.attention_backends.kernels.triton.ranges import prefill_tile_queries  # a CPU may have no Triton

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
            table = _own_key_table(tile_queries, cache.device)
            impl.attend_rerotated(query, cache, torch.empty_like(query), RangeAttention([table]))


def _own_key_table(tile_queries: int, device: torch.device) -> RangeTable:
    """Make the table of one token that sees itself, in page 0."""
    ones, zeros = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    places = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    ranges = TokenRanges(zeros, ones, zeros, zeros, ones, zeros)
    return make_range_table(ranges, tile_queries, places[:, :1], places[0], places[0, 1:])
