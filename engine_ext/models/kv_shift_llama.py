"""Llama with KV shifting attention, for models trained from scratch (`model_type` kv_shift_llama).

Configuration and tensor names are Llama's. Each layer also has ``self_attn.conv_k`` and ``self_attn.conv_v``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from starling.engine_ext.models.checkpoint import (
    Shapes,
    checked_weights,
    mlp_and_norm_shapes,
    outer_shapes,
    shift_shapes,
)
from starling.engine_ext.models.shifted_attention import KVShiftAttention


def expected_tensors(config: Any) -> Shapes:
    """Shapes of all tensors of the checkpoint, by name."""
    hidden, size = config.hidden_size, config.head_dim
    widths = {
        "q_proj": config.num_attention_heads * size,
        "k_proj": config.num_key_value_heads * size,
        "v_proj": config.num_key_value_heads * size,
    }
    layer = shift_shapes(config.num_key_value_heads) | mlp_and_norm_shapes(config)
    layer |= {f"self_attn.{name}.weight": (width, hidden) for name, width in widths.items()}
    layer["self_attn.o_proj.weight"] = (hidden, widths["q_proj"])
    if config.attention_bias:
        layer |= {f"self_attn.{name}.bias": (width,) for name, width in (widths | {"o_proj": hidden}).items()}
    layers = range(config.num_hidden_layers)
    inner = {f"model.layers.{index}.{name}": shape for index in layers for name, shape in layer.items()}
    return outer_shapes(config) | inner


class KVShiftDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=KVShiftAttention)


class KVShiftLlamaForCausalLM(LlamaForCausalLM):
    loaded = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=KVShiftDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint or an update of some tensors; returns the names of the parameters that were loaded.

        Raises:
            ValueError: see ``checked_weights``.
        """
        quantized = self.model.quant_config is not None
        expected = expected_tensors(self.config)
        names = super().load_weights(checked_weights(weights, expected, quantized=quantized, update=self.loaded))
        self.loaded = True
        return names
