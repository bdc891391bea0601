"""vLLM's GPU attention, with Starling's Triton kernels for rows that attend to blocks with positions of their own.

Such a row needs the log-sum-exp of its other keys, which vLLM's implementations do not give.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl

from starling.attention_backends.kernels.ranges import RangeTable
from starling.attention_backends.kernels.rotary import Rotation
from starling.attention_backends.star.document_step import DocumentStep
from starling.attention_backends.star.range_attention import RangeAttention
from starling.attention_backends.star.step import current_part
from starling.vllm_compat.patching import extends, touches

_in_use = False
_rotations: Mapping[str, Rotation] = {}


def use_block_positions(in_use: bool) -> None:
    """Say whether the engine of this process may have blocks with positions of their own, before its layers are made.

    Where it may, full CUDA graphs of decode steps have Starling's kernels for all rows.
    """
    global _in_use
    _in_use = in_use


def use_rotations(rotations: Mapping[str, Rotation]) -> None:
    """Give the rotary embeddings of the engine's layers, by their names, before a CUDA graph is captured."""
    global _rotations
    _rotations = rotations


def rotations_in_use() -> Mapping[str, Rotation]:
    """What ``use_rotations`` was told; none at first."""
    return _rotations


def keep_for_capture(metadata: Any, table: RangeTable) -> None:
    """Let layers that are captured with this metadata of vLLM's attend to the ranges of a table."""
    metadata.starling_captured = RangeAttention(_rotations, [table])


def block_positions_in_use() -> bool:
    """What ``use_block_positions`` was told; False at first."""
    return _in_use


def turns_queries(impl: Any) -> bool:
    """Whether an attention implementation is one that ``make_turned_impl`` made."""
    return getattr(impl, "turns_queries", False)


def unsupported_reason(impl: Any) -> str | None:
    """The reason why the kernels can't run a layer, whatever the batch; None where they can."""
    for refused, reason in (
        (impl.alibi_slopes is not None, "it has ALiBi slopes"),
        (impl.sinks is not None, "it has attention sinks"),
        (impl.kv_cache_dtype.startswith("fp8"), "its cache is fp8"),
    ):
        if refused:
            return reason
    return None


@functools.cache
def make_turned_impl(base: type[AttentionImpl]) -> type[AttentionImpl]:
    """A subclass of a GPU backend's implementation for caches of shape (pages, KV heads, page size, 2 * head size)."""

    @extends(AttentionImpl)
    @touches("vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.logits_soft_cap")
    class TurnedImpl(base):  # type: ignore[misc, valid-type]
        turns_queries = True

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
            turned = getattr(attn_metadata, "starling_captured", None)
            documents = current_part(DocumentStep)
            if documents is not None and attn_metadata is not None:
                turned = documents.attention(kv_cache.shape[2])
            if turned is None or not turned.is_whole_step:
                super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            if turned is None:
                return output
            self.attend_turned(layer, query, kv_cache, output, turned)
            return output

        def attend_turned(
            self,
            layer: Any,
            query: torch.Tensor,
            kv_cache: torch.Tensor,
            output: torch.Tensor,
            turned: RangeAttention,
        ) -> None:
            """Write the attention of a step with blocks with positions of their own; arguments as of ``forward``."""
            caches = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            options = {"scale": self.scale, "softcap": self.logits_soft_cap or 0.0}
            shape = (-1, self.num_heads, self.head_size)
            turned.attend(layer.layer_name, query.view(shape), output.view(shape), caches, **options)

    TurnedImpl.__name__ = TurnedImpl.__qualname__ = f"Turned{base.__name__}"
    return TurnedImpl
