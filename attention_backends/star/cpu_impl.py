"""vLLM's CPU attention, with Starling's op for the batches where that is faster (kernels/cpu/paged_op.py)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from starling.attention_backends.kernels.contract import CPU_ISAS, Layout, Operands, Rotation, as_fp8
from starling.attention_backends.kernels.cpu.paged_op import (
    VECTOR_SIZE,
    Op,
    Processor,
    built_op,
    paged_attention,
    select_op,
)
from starling.attention_backends.star.head_step import attend_by_heads
from starling.attention_backends.star.step import current_step
from starling.config.entry import config_of
from starling.vllm_compat.config import kv_scales


def unsupported_reason(impl: CPUAttentionBackendImpl) -> str | None:
    """Return the reason why Starling's op can't run a layer, whatever the batch, or None if it can."""
    for refused, reason in (
        (impl.attn_type != AttentionType.DECODER, "its attention is not a decoder's"),
        (impl.alibi_slopes is not None, "it has ALiBi slopes"),
        (impl.sinks is not None, "it has attention sinks"),
        (impl.sliding_window != -1, "it has a sliding window"),
        (impl.head_size % VECTOR_SIZE, f"its head size is no multiple of {VECTOR_SIZE}"),
    ):
        if refused:
            return reason
    return None


class CpuImpl(CPUAttentionBackendImpl):
    """Attention of one layer. vLLM's op runs the batches that Starling's does not support or is slower on.

    Attributes:
        setting: `cpu_attention`: the op that the layer attends with, the faster one of each batch or vLLM's.
        rotation: the rotary embedding of the layer, where a step has had documents; given by the worker.
    """

    rotation: Rotation | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = config_of(get_current_vllm_config())
        self.setting = config.cpu_attention if config else "vllm"
        self.has_fp8_cache = is_quantized_kv_cache(self.kv_cache_dtype)
        # The op is built here, while the engine starts, and not in the first request.
        self.has_op = unsupported_reason(self) is None and self.setting != "vllm" and built_op() is not None

    def uses_op(self, query: torch.Tensor, layer: Any, metadata: Any) -> bool:
        """Return whether Starling's op runs a batch.

        Args:
            query: (tokens, heads, head size).
            layer: vLLM's attention layer.
            metadata: vLLM's attention metadata of the batch, or None in warm-up runs.
        """
        if not self.has_op or self.setting == "vllm" or metadata is None or layer.isa not in CPU_ISAS:
            return False
        if self.has_fp8_cache:  # never measured
            return False
        if metadata.causal is not True or metadata.dynamic_causal is not None:
            return False
        op = select_op(
            _processor(),
            query.dtype,
            queries=metadata.max_query_len,
            keys=metadata.max_seq_len,
            group=self.num_queries_per_kv,
        )
        return op is Op.STARLING

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

        As in vLLM's method, K and V of the step are in the cache already. Where other replicas hold keys of the rows,
        they attend to these keys at the same time, and the parts are merged. So is the attention to documents. Where
        some heads see everything, the step's rows are others for each kind of heads: one call of Starling's op computes
        all of them, or a call of vLLM's each run of heads of one kind.
        """
        remote = rerotated = kinds = None
        if (step := current_step()) is not None:  # outside of a step there may be no cache yet
            page_size, kinds = kv_cache.shape[2], step.heads
            remote = step.remote_attention(page_size)
            rerotated = None if step.documents is None else step.documents.attention(page_size)
        if remote is None and rerotated is None and not self.uses_op(query, layer, attn_metadata):
            calls = None if kinds is None else kinds.calls(layer.layer_name)
            if step is None or calls is None:
                return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            tensors = query, key, value, kv_cache, output
            attend_by_heads(
                CPUAttentionBackendImpl, "CPU_ATTN", self, calls, step.num_tokens, layer, *tensors, *args, **kwargs
            )
            return output
        heads = None if kinds is None else kinds.row_heads(layer.layer_name)
        tokens = attn_metadata.num_actual_tokens
        caches, options = self._caches(layer, kv_cache)
        if rerotated is not None and rerotated.is_whole_step and remote is None and heads is None:
            rerotated.attend(self.rotation, query[:tokens], output[:tokens], caches, Layout.CPU, **options)
            return output
        sent = remote.begin(layer.layer_name, query[:tokens], self.scale, self.logits_soft_cap) if remote else {}
        rows, row_heads = heads or (attn_metadata, None)
        operands = Operands(
            query[:tokens],
            *caches,
            rows.block_table,
            rows.query_start_loc,
            rows.seq_lens,
            row_heads=row_heads,
            out=output[:tokens],
            layout=Layout.CPU,
            **options,
        )
        out, lse = paged_attention(operands)
        if remote is not None:
            remote.finish(sent, out, lse)
        if rerotated is not None:
            rerotated.add(self.rotation, query[:tokens], out, lse, caches, Layout.CPU, **options)
        return output

    def _caches(self, layer: Any, kv_cache: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """Return the caches of keys and of values for Starling's op, and its keyword arguments for them."""
        num_pages, kv_heads, page_size, _ = kv_cache.shape
        key_cache, value_cache = kv_cache.view(num_pages, kv_heads, 2 * page_size, -1).chunk(2, dim=2)
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.logits_soft_cap}
        if self.has_fp8_cache:
            key_cache, value_cache = (as_fp8(cache, self.kv_cache_dtype) for cache in (key_cache, value_cache))
            options |= kv_scales(layer)
        return (key_cache, value_cache), options


@functools.cache
def _processor() -> Processor:
    return Processor.detect()
