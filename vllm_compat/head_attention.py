"""vLLM's metadata builders and attention implementations, for some of a layer's heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from starling.vllm_compat.patching import touches

T = TypeVar("T")


@touches(
    "vllm.v1.attention.backends.flash_attn.FlashAttentionMetadataBuilder"
    ".{num_heads_q, num_heads_kv, use_full_cuda_graph}",
)
def _flash_attention(builder: Any, num_kv_heads: int) -> Any:
    """Copy a builder; outside of full CUDA graphs it keeps no tensor from one build to the next."""
    made = copy.copy(builder)
    made.num_heads_q = builder.num_heads_q // builder.num_heads_kv * num_kv_heads
    made.num_heads_kv = num_kv_heads
    made.use_full_cuda_graph = False
    return made


@touches("vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder.{num_heads, num_kv_heads}")
def _cpu_attention(builder: Any, num_kv_heads: int) -> Any:
    made = copy.copy(builder)
    made.num_heads = builder.num_heads // builder.num_kv_heads * num_kv_heads
    made.num_kv_heads = num_kv_heads
    return made


@touches(
    "vllm.v1.attention.backends.flashinfer.FlashInferMetadataBuilder"
    ".{num_qo_heads, num_kv_heads, enable_cuda_graph, _prefill_wrapper, _decode_wrapper, _get_workspace_buffer}",
)
def _flashinfer(builder: Any, num_kv_heads: int) -> Any:
    """Copy a builder with wrappers of its own, since each holds one plan, and the shared workspace.

    The workspace is read and written within a call, so all share one.
    """
    made = copy.copy(builder)
    made.num_qo_heads = builder.num_qo_heads // builder.num_kv_heads * num_kv_heads
    made.num_kv_heads = num_kv_heads
    made.enable_cuda_graph = False
    made._prefill_wrapper = made._decode_wrapper = None
    made._get_workspace_buffer = builder._get_workspace_buffer
    return made


@touches(
    "vllm.v1.attention.backends.flashinfer.FlashInferMetadataBuilder"
    ".{paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len}",
)
@touches(
    "vllm.v1.attention.backends.flashinfer.FlashInferMetadataBuilder.qo_indptr_prefill",
    since="0.34",
)
def _with_own_rows(builder: Any) -> Any:
    """Copy a builder with buffers of its own, since metadata that it has built reads from them."""
    from vllm.v1.utils import CpuGpuBuffer

    made = copy.copy(builder)
    if hasattr(builder, "qo_indptr_prefill"):
        made.qo_indptr_prefill = builder.qo_indptr_prefill.new_zeros(builder.qo_indptr_prefill.shape)
    for name in ("paged_kv_indptr", "paged_kv_last_page_len"):
        like = getattr(builder, name).gpu
        buffer = CpuGpuBuffer(*like.shape, dtype=like.dtype, device=builder.device, pin_memory=False)
        setattr(made, name, buffer)
    made.paged_kv_indices = builder.paged_kv_indices.new_zeros(builder.paged_kv_indices.shape)
    return made


def builder_of_heads(backend: str, builder: Any, num_kv_heads: int) -> Any:
    """Return a backend's metadata builder for calls on ``num_kv_heads`` of its layers' KV heads and their query heads.

    It shares the buffers for pages with the one it is made from. So both may build for the same rows in one step, and
    not for others. Goes when a builder can be made for other numbers of heads than those of its layers.

    Args:
        backend: vLLM's name of the backend. The metadata of TRITON_ATTN holds for any heads: the kernel takes their
            number from its operands, and its buffers have room for all.
    """
    made = {"CPU_ATTN": _cpu_attention, "FLASH_ATTN": _flash_attention, "FLASHINFER": _flashinfer}.get(backend)
    return builder if made is None else made(builder, num_kv_heads)


def builder_of_other_rows(backend: str, builder: Any) -> Any:
    """Return a backend's metadata builder that may build for other rows in the same step.

    Goes with ``builder_of_heads``.
    """
    return _with_own_rows(builder) if backend == "FLASHINFER" else builder


@touches("vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.{num_heads, num_kv_heads, sinks}")
def impl_of_heads(impl: T, first: int, stop: int) -> T:
    """Return an implementation like ``impl`` for its layer's KV heads ``[first, stop)`` and their query heads.

    Goes when an implementation takes the numbers of heads from its operands.
    """
    whole: Any = impl
    made: Any = object.__new__(type(impl))  # copy.copy would look for process groups
    vars(made).update(vars(impl))
    group = whole.num_heads // whole.num_kv_heads
    made.num_heads, made.num_kv_heads = (stop - first) * group, stop - first
    if whole.sinks is not None:
        made.sinks = whole.sinks[first * group : stop * group]
    return made


@touches("vllm.v1.attention.backend.AttentionLayer.{_k_scale, _v_scale}")
def has_scales_by_head(layer: Any) -> bool:
    """Return whether the KV cache of an attention layer has a scale for each head. Goes with a public field."""
    return max(layer._k_scale.numel(), layer._v_scale.numel()) > 1


@touches(
    "vllm.v1.attention.backends.flash_attn.FlashAttentionMetadataBuilder.{_get_scheduler_metadata, max_cudagraph_size}",
    "vllm.v1.attention.backends.flash_attn.FlashAttentionMetadata.max_num_splits",
)
def build_unsplit(backend: str, builder: Any, num_tokens: int, build: Callable[[], Any]) -> Any:
    """Return a backend's metadata for virtual rows, with one split of the keys in steps above the largest CUDA graph.

    vLLM leaves the number of splits of such a step to FlashAttention. FlashAttention 3 and 4 decide by the longest
    query and the most keys, as if one row had both, and keep splits x heads x tokens of the step x head size numbers in
    float32. A dense step of as many tokens has a long row, and with it one split. Virtual rows are short, and one
    decode behind a long prompt gives them several splits: 0.5 GiB for 4 splits of 8,192 tokens and 32 heads of 128,
    which no memory profile has seen.

    FlashAttention 3 takes its tiles by the number of splits, so the scheduler metadata must be made for the number that
    the layers pass. Goes when the common metadata has the number of splits.

    Args:
        backend: vLLM's name of the backend. Only FLASH_ATTN's kernels split so.
        builder: the metadata builder that ``build`` calls.
        num_tokens: number of tokens of the step.
    """
    if backend != "FLASH_ATTN" or num_tokens <= (builder.max_cudagraph_size or 0):
        return build()

    def scheduler_metadata(**arguments: Any) -> Any:
        return type(builder)._get_scheduler_metadata(builder, **arguments | {"max_num_splits": 1})

    builder._get_scheduler_metadata = scheduler_metadata
    try:
        metadata = build()
    finally:
        del builder._get_scheduler_metadata
    metadata.max_num_splits = 1
    return metadata
