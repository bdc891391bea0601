"""vLLM's CPU attention with this folder's op in place of its own, wherever that one is faster (choose.py)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from attention_backends.kernels.choose import SETTINGS, Op, Processor, choose
from attention_backends.kernels.contract import CPU_ISAS, Layout
from attention_backends.kernels.cpu import STEP, built_op, paged_attention

_setting = "auto"


def use(setting: str) -> None:
    """Which op this process's layers attend with: the faster one, or vLLM's always (raises ValueError)."""
    global _setting
    if setting not in SETTINGS:
        raise ValueError(f"cpu_attention={setting!r} is refused. Allowed: {', '.join(SETTINGS)}")
    _setting = setting


def reason_against(impl: CPUAttentionBackendImpl) -> str | None:
    """Why a layer can't use the op, whatever the batch; None where it can."""
    for refused, reason in (
        (impl.attn_type != AttentionType.DECODER, "its attention is not a decoder's"),
        (impl.alibi_slopes is not None, "it has ALiBi slopes"),
        (impl.sinks is not None, "it has attention sinks"),
        (impl.sliding_window != -1, "it has a sliding window"),
        (impl.is_fp8_kv_cache, "its cache is fp8"),
        (impl.head_size % STEP, f"its head size is no multiple of {STEP}"),
    ):
        if refused:
            return reason
    return None


class CpuImpl(CPUAttentionBackendImpl):
    """One layer. What the op does not do, and batches that vLLM's is faster on, go to vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Built now, while the engine starts, and not in the first request.
        self.can = reason_against(self) is None and _setting != "vllm" and built_op() is not None

    def takes(self, query: torch.Tensor, layer: Any, metadata: Any) -> bool:
        """Whether the op runs a batch."""
        if not self.can or _setting == "vllm" or metadata is None or layer.isa not in CPU_ISAS:
            return False
        if metadata.causal is not True or metadata.dynamic_causal is not None:
            return False
        op = choose(
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
        """As vLLM's: K and V of the step are in the cache already; writes to ``output`` (tokens, heads, head size).

        Where the metadata has ``shards``, other replicas attend over the keys that they hold, at the same time.
        """
        shards = getattr(attn_metadata, "shards", None)
        if shards is None and not self.takes(query, layer, attn_metadata):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        tokens = attn_metadata.num_actual_tokens
        pages, kv_heads, page, _ = kv_cache.shape
        keys, values = kv_cache.view(pages, kv_heads, 2 * page, -1).chunk(2, dim=2)
        asked = shards.begin(layer.layer_name, query[:tokens], self.scale, self.logits_soft_cap) if shards else {}
        out, lse = paged_attention(
            query[:tokens],
            keys,
            values,
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            scale=self.scale,
            softcap=self.logits_soft_cap,
            out=output[:tokens],
            layout=Layout.CPU,
        )
        if shards is not None:
            shards.finish(asked, out, lse)
        return output


@functools.cache
def _processor() -> Processor:
    return Processor.here()
