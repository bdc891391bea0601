"""Llama with KV shifting attention, for models trained from scratch (`model_type` kv_shift_llama).

Configuration and tensor names are Llama's. Each layer also has ``self_attn.conv_k`` and ``self_attn.conv_v``.
"""

from __future__ import annotations

from typing import Any

from starling.engine_ext.models.checkpoint import Shapes, mlp_and_norm_shapes, outer_shapes, shift_shapes
from starling.engine_ext.models.shifted_attention import KVShiftAttention, KVShiftForCausalLM


def expected_tensors(config: Any) -> Shapes:
    """Return the shapes of all tensors of the checkpoint, by name."""
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


class KVShiftLlamaForCausalLM(KVShiftForCausalLM):
    attention = KVShiftAttention
    expected_tensors = staticmethod(expected_tensors)
