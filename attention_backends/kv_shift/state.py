"""The raw K and V of each sequence's last token, in a paged KV cache group of its own.

The group is a sliding window of 2: of the tokens before the next one, vLLM keeps the page of the last. So it is
allocated, freed, prefix-cached and preempted by vLLM like any other group. vLLM's Inkling model holds the
state of its short convolutions the same way.
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

from attention_backends.kv_shift.kernel import shift_kernel
from attention_backends.kv_shift.shift import ShiftMetadata, find_predecessors, shift
from engine_ext import compat

WINDOW = 2
OP = "starling::kv_shift"


class ShiftStateBuilder(AttentionMetadataBuilder[ShiftMetadata]):
    """Finds each request's predecessor; buffers that live on let decode graphs be replayed."""

    holds_keys: ClassVar[bool] = False
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

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
        self.first_rows[:requests].copy_(rows)
        self.first_slots[:requests].copy_(slots)
        return ShiftMetadata(self.first_rows[:requests], self.first_slots[:requests], common.slot_mapping)


class ShiftStateBackend(AttentionBackend):
    """Metadata only: the shift reads and writes the state itself, through whatever strides vLLM gave it."""

    @staticmethod
    def get_name() -> str:
        return "STARLING_KV_SHIFT_STATE"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the state of KV shifting attention has no attention kernel")

    @staticmethod
    def get_builder_cls() -> type[ShiftStateBuilder]:
        return ShiftStateBuilder


def state_spec(attention: AttentionSpec, dtype: torch.dtype) -> SlidingWindowSpec:
    """The state's cache spec beside an attention layer's, with as many bytes a page.

    Args:
        attention: the spec of the attention layer whose K and V are shifted.
        dtype: of the raw K and V, the model's: a quantised state would be mixed into every later token.

    Raises:
        ValueError: the attention page does not hold a whole fraction of its own tokens in ``dtype``.
    """
    token = attention.num_kv_heads * 2 * attention.head_size * dtype.itemsize
    tokens, rest = divmod(attention.page_size_bytes, token)
    if rest or not tokens or attention.block_size % tokens:
        raise ValueError(
            f"KV shifting attention: the KV cache's page of {attention.block_size} tokens has "
            f"{attention.page_size_bytes} bytes, which don't hold a whole fraction of these tokens' raw K and V in "
            f"{dtype} ({token} bytes each). Use --kv-cache-dtype auto or fp8."
        )
    return SlidingWindowSpec(
        block_size=tokens,
        num_kv_heads=attention.num_kv_heads,
        head_size=attention.head_size,
        dtype=dtype,
        sliding_window=WINDOW,
    )


class ShiftState(nn.Module, AttentionLayerBase):
    """Shifts K and V before an attention layer, and owns the state that takes.

    Args:
        attention: vLLM's Attention layer that gets the shifted K and V.
        prefix: name of this layer, unique in the model.
    """

    def __init__(self, attention: Any, prefix: str):
        super().__init__()
        config = get_current_vllm_config()
        refuse_unsupported(config)
        self.attention = [attention]  # in a list, so that it is not a submodule of this one too
        self.prefix = prefix
        self.kv_cache = torch.tensor([])
        self.dtype: Any = config.model_config.dtype  # a torch.dtype by now
        compat.register_layer(config, prefix, self)
        compat.split_graph_at(config, OP)

    def forward(
        self, key: torch.Tensor, value: torch.Tensor, key_weights: torch.Tensor, value_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes as in shift.shift."""
        return torch.ops.starling.kv_shift(key, value, key_weights, value_weights, self.prefix)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ShiftStateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SlidingWindowSpec:
        return state_spec(compat.attention_spec(self.attention[0], vllm_config), self.dtype)


def refuse_unsupported(config: Any) -> None:
    """Raises ValueError for what the state is not exact under."""
    parallel, hybrid_off = config.parallel_config, config.scheduler_config.disable_hybrid_kv_cache_manager
    for name, value, reason in (
        ("decode_context_parallel_size", parallel.decode_context_parallel_size > 1, "it shards sequences"),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size > 1, "it splits prompts"),
        ("enable_dbo", parallel.enable_dbo, "half a request's chunk would miss what the other half leaves"),
        # vLLM then makes one group of attention layers and states, and says of all that their window is 2.
        (
            "disable_hybrid_kv_cache_manager",
            hybrid_off,
            "the state needs a group of its own (some KV connectors set it)",
        ),
    ):
        if value:
            raise ValueError(f"KV shifting attention does not run with {name}: {reason}")


def _kv_shift(
    key: torch.Tensor,
    value: torch.Tensor,
    key_weights: torch.Tensor,
    value_weights: torch.Tensor,
    layer_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    context = get_forward_context()
    layer: Any = context.no_compile_layers[layer_name]
    metadata: Any = context.attn_metadata
    if isinstance(metadata, list):
        metadata = metadata[0]
    tensors = (key, value, key_weights, value_weights, layer.kv_cache)
    if metadata is None:
        return shift(*tensors, None)
    run = shift_kernel if HAS_TRITON and key.is_cuda else shift
    return run(*tensors, metadata[layer_name])


def _kv_shift_fake(
    key: torch.Tensor,
    value: torch.Tensor,
    key_weights: torch.Tensor,
    value_weights: torch.Tensor,
    layer_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return key.new_empty(key.shape), value.new_empty(value.shape)


compat.register_op(OP, _kv_shift, _kv_shift_fake)
