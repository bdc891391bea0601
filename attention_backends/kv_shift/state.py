"""The state of KV shifting attention: the raw K and V of each sequence's last token, in their own KV cache group.

The group has a sliding window of 2 tokens, so vLLM keeps the page of the last computed token. vLLM allocates, frees,
prefix-caches and preempts the state like any other group. vLLM's Inkling model stores the state of its short
convolutions in the same way.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

from starling.attention_backends.kv_shift.kernel import shift_kernel
from starling.attention_backends.kv_shift.shift import NO_ROW, NO_SLOT, ShiftMetadata, find_predecessors, shift
from starling.vllm_compat.config import split_graph_at
from starling.vllm_compat.models import attention_spec, register_layer, register_op

WINDOW = 2
OP = "starling::kv_shift"


class ShiftStateBuilder(AttentionMetadataBuilder[ShiftMetadata]):
    """Finds each request's predecessor. The metadata are views of persistent buffers.

    A CUDA graph keeps the views of its capture, which may have more requests than the step that replays the graph. So
    every build also resets the rows after the requests of its step: such rows read no state and change no output.
    """

    holds_keys: ClassVar[bool] = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        requests = vllm_config.scheduler_config.max_num_seqs
        self.first_rows = torch.zeros(requests, dtype=torch.int32, device=device)
        self.first_slots = torch.zeros(requests, dtype=torch.int64, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ShiftMetadata:
        common = common_attn_metadata
        rows, slots = find_predecessors(
            common.query_start_loc, common.seq_lens, common.block_table_tensor, self.kv_cache_spec.block_size
        )
        requests = len(rows)
        for buffer, live, unused in ((self.first_rows, rows, NO_ROW), (self.first_slots, slots, NO_SLOT)):
            buffer[:requests].copy_(live)
            buffer[requests:].fill_(unused)
        return ShiftMetadata(self.first_rows[:requests], self.first_slots[:requests], common.slot_mapping)


class ShiftStateBackend(AttentionBackend):
    """Provides the metadata only: the shift reads and writes the state itself, with any strides that vLLM gives it."""

    @staticmethod
    def get_name() -> str:
        return "STARLING_KV_SHIFT_STATE"

    @staticmethod
    def get_impl_cls() -> Any:
        """Raise NotImplementedError: no attention implementation exists."""
        raise NotImplementedError("the state of KV shifting attention has no attention kernel")

    @staticmethod
    def get_builder_cls() -> type[ShiftStateBuilder]:
        return ShiftStateBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Yes: a row's sum is the same whatever rows lie beside it."""
        return True


def state_spec(attention: AttentionSpec, dtype: torch.dtype) -> SlidingWindowSpec:
    """Return the cache spec of the state, whose pages have as many bytes as those of the attention layer.

    Args:
        attention: the spec of the attention layer whose K and V are shifted.
        dtype: dtype of the raw K and V, the model's dtype: errors of a quantised state would spread to later tokens.

    Raises:
        ValueError: a page of the attention layer holds no whole fraction of its own tokens in ``dtype``.
    """
    token_bytes = attention.num_kv_heads * 2 * attention.head_size * dtype.itemsize
    page_size, rest = divmod(attention.page_size_bytes, token_bytes)
    if rest or not page_size or attention.block_size % page_size:
        raise ValueError(
            f"KV shifting attention: a KV page of {attention.block_size} tokens has {attention.page_size_bytes} bytes, "
            f"which do not hold a whole fraction of these tokens' raw K and V in {dtype} ({token_bytes} bytes each). "
            "Use --kv-cache-dtype auto or fp8."
        )
    return SlidingWindowSpec(
        block_size=page_size,
        num_kv_heads=attention.num_kv_heads,
        head_size=attention.head_size,
        dtype=dtype,
        sliding_window=WINDOW,
    )


class ShiftState(nn.Module, AttentionLayerBase):
    """Shifts K and V before an attention layer, and owns the state for it.

    Args:
        attention: vLLM's Attention layer that gets the shifted K and V.
        prefix: name of this layer, unique in the model.

    Raises:
        ValueError: a feature that ``refuse_unsupported`` names is on, or the name is in use.
    """

    def __init__(self, attention: Any, prefix: str):
        super().__init__()
        config = get_current_vllm_config()
        refuse_unsupported(config)
        self.attention = [attention]  # a list keeps torch from registering the layer as a submodule
        self.prefix = prefix
        self.kv_cache = torch.tensor([])
        self.dtype: Any = config.model_config.dtype  # vLLM has resolved it to a torch.dtype
        register_layer(config, prefix, self)
        split_graph_at(config, OP)

    def forward(
        self, key: torch.Tensor, value: torch.Tensor, key_weights: torch.Tensor, value_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shifted K and V, (T, KV heads * head size), of raw ones; the weights are (KV heads, 2), [previous, current].

        The outputs are made here and not by the op, like those of vLLM's attention ops. So they belong to the piece
        of the graph before the op, and the piece after it, a CUDA graph, reads them at the addresses of its capture.
        """
        out_key, out_value = key.new_empty(key.shape), value.new_empty(value.shape)
        torch.ops.starling.kv_shift(key, value, key_weights, value_weights, out_key, out_value, self.prefix)
        return out_key, out_value

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ShiftStateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SlidingWindowSpec:
        """Return the spec of the state; raises ValueError, see ``state_spec``."""
        return state_spec(attention_spec(self.attention[0], vllm_config), self.dtype)


def refuse_unsupported(config: Any) -> None:
    """Check a VllmConfig for features with which the state is not exact.

    Raises:
        ValueError: such a feature is on.
    """
    parallel, hybrid_off = config.parallel_config, config.scheduler_config.disable_hybrid_kv_cache_manager
    for name, is_on, reason in (
        ("decode_context_parallel_size", parallel.decode_context_parallel_size > 1, "it shards sequences"),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size > 1, "it splits prompts"),
        (
            "enable_dbo or ubatch_size",
            parallel.use_ubatching,
            "one half of a request's chunk would not see the state of the other half",
        ),
        # vLLM then puts attention layers and states in one group, and gives all of them the window of 2.
        (
            "disable_hybrid_kv_cache_manager",
            hybrid_off,
            "the state needs its own KV cache group (some KV connectors set this option)",
        ),
    ):
        if is_on:
            raise ValueError(f"KV shifting attention does not run with {name}: {reason}")


def _kv_shift(
    key: torch.Tensor,
    value: torch.Tensor,
    key_weights: torch.Tensor,
    value_weights: torch.Tensor,
    out_key: torch.Tensor,
    out_value: torch.Tensor,
    layer_name: str,
) -> None:
    context = get_forward_context()
    layer: Any = context.no_compile_layers[layer_name]
    metadata: Any = context.attn_metadata
    if isinstance(metadata, list):
        metadata = metadata[0]
    step = None if metadata is None else metadata[layer_name]
    tensors = (key, value, key_weights, value_weights, layer.kv_cache)
    if step is not None and HAS_TRITON and key.is_cuda:
        shift_kernel(*tensors, step, out_key, out_value)
    else:
        for out, shifted in zip((out_key, out_value), shift(*tensors, step), strict=True):
            out.copy_(shifted)


register_op(OP, _kv_shift, mutates=("out_key", "out_value"))
