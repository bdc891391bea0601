"""The number of parts into which FlashAttention splits the keys of a step's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starling.vllm_compat.patching import touches


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
