"""vLLM attention backends whose layers run Starling's kernels on GPUs: the option ``gpu_attention``.

Pages, their layout, how they are written and the metadata are those of vLLM's Triton backend. The attention over them
is computed by Starling's Triton kernels, or by xformers' (``kernels/``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from starling.attention_backends.kernels.contract import FP8_DTYPES, Operands, Sizes, as_fp8
from starling.attention_backends.kernels.xformers_probe import DTYPES, HEAD_SIZES, gather_facts, unavailable_reason
from starling.attention_backends.paged import NAME
from starling.config.entry import GPU_ATTENTION
from starling.vllm_compat.config import kv_scales
from starling.vllm_compat.patching import touches

Kernel = Callable[[Operands], tuple[torch.Tensor, torch.Tensor]]


class PagedImpl(TritonAttentionImpl):
    """The attention of a layer by a kernel of the contract in ``kernels/contract.py``."""

    @touches(
        "vllm.v1.attention.backends.triton_attn.TritonAttentionImpl"
        ".{alibi_slopes, sliding_window, chunk_lookback, logits_soft_cap, supports_quant_query_input}"
    )
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's.

        Raises:
            NotImplementedError: the kernel can't compute the layer, for a reason that vLLM does not ask a backend for.
        """
        super().__init__(*args, **kwargs)
        reason = self.unsupported_reason()
        if reason is not None:
            raise NotImplementedError(f"{GPU_ATTENTION} is refused: {reason}. Allowed for this model: vllm")
        self.supports_quant_query_input = False
        self.kernel = self.load_kernel()
        before = self.sliding_window[0]
        self.window = None if before < 0 else before + 1

    def load_kernel(self) -> Kernel:
        """Import the library of the kernel and return the kernel."""
        raise NotImplementedError

    def unsupported_reason(self) -> str | None:
        """Return the reason why the kernel can't compute the layer, or None if it can."""
        if self.alibi_slopes is not None:
            return "a layer has ALiBi slopes"
        return "a layer looks back at chunks of tokens" if self.chunk_lookback >= 0 else None

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
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the attention of a step to ``output`` (tokens, heads, head size) and return it.

        As in vLLM's method, K and V of the step are in the cache already.

        Args:
            kv_cache: (pages, KV heads, page size, 2 * head size).
            attn_metadata: TritonAttentionMetadata; None while vLLM profiles.
        """
        if attn_metadata is None:
            return output.fill_(0)
        tokens, shape = attn_metadata.num_actual_tokens, (-1, self.num_heads, self.head_size)
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        scales: dict[str, Any] = {}
        if self.kv_cache_dtype in FP8_DTYPES:
            keys, values = (as_fp8(cache, self.kv_cache_dtype) for cache in (keys, values))
            scales = kv_scales(layer)
        self.kernel(
            Operands(
                query[:tokens].view(shape),
                keys,
                values,
                attn_metadata.block_table,
                attn_metadata.query_start_loc,
                attn_metadata.seq_lens,
                scale=self.scale,
                window=self.window,
                softcap=self.logits_soft_cap,
                out=output[:tokens].view(shape),
                **scales,
            )
        )
        return output


class TritonImpl(PagedImpl):
    """Implementation with Starling's Triton kernels."""

    def load_kernel(self) -> Kernel:
        from starling.attention_backends.kernels.triton.paged import paged_attention

        return paged_attention

    def unsupported_reason(self) -> str | None:
        from starling.attention_backends.kernels.triton.launch import make_tile

        sizes = Sizes(1, 1, self.num_heads, self.num_kv_heads, self.head_size, self.head_size, 16)
        try:
            make_tile(sizes, torch.get_default_dtype().itemsize, 1)  # the model's dtype, while it is made
        except ValueError as error:
            return str(error)
        return super().unsupported_reason()


class XformersImpl(PagedImpl):
    """Implementation with xformers' paged attention."""

    def load_kernel(self) -> Kernel:
        from starling.attention_backends.kernels.xformers_paged import paged_attention

        return paged_attention

    def unsupported_reason(self) -> str | None:
        return "xformers' paged attention has no softcap" if self.logits_soft_cap else super().unsupported_reason()


class XformersBuilder(TritonAttentionMetadataBuilder):
    """The host reads the rows' lengths, so no CUDA graph has such a call."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER


class PagedBackend(TritonAttentionBackend):
    """Base of both backends: full causal attention and sliding windows of decoders, and nothing else."""

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER


class TritonBackend(PagedBackend):
    """Starling's Triton kernels."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *FP8_DTYPES]

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return TritonImpl

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 16 <= head_size <= 256


class XformersBackend(PagedBackend):
    """xformers' paged attention, with its limits."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [*DTYPES]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return XformersImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return XformersBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in HEAD_SIZES

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        """Return the reason why xformers can't be used on this machine, or None if it can."""
        return unavailable_reason(gather_facts())
