"""Configurations of the model families with KV shifting attention. Every process imports this file at plugin load."""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlamaConfig

SHIFT_DEPENDS = "KV shifting mixes the last token of a star block into the first token of the next block"


class KVShiftLlamaConfig(LlamaConfig):
    """Configuration of a Llama with KV shifting attention; the fields are Llama's."""

    model_type = "kv_shift_llama"
    star_blocks_depend = SHIFT_DEPENDS


class BaichuanM1Config(LlamaConfig):
    """Configuration of Baichuan-M1. Some layers have a sliding window and their own numbers of heads.

    Args:
        sliding_window: size of the window in tokens, in the layers of ``sliding_window_layers``.
        sliding_window_layers: indices of the layers with a sliding window.
        num_swa_attention_heads, num_swa_key_value_heads: heads of these layers, or None for those of the other layers.
        conv_window: number of tokens that the shift mixes, always 2.

    Raises:
        ValueError: ``conv_window`` is not 2, or windowed layers have no ``sliding_window``.
    """

    model_type = "baichuan_m1"
    star_blocks_depend = SHIFT_DEPENDS

    sliding_window: int | None = None
    sliding_window_layers: list[int] | None = None
    num_swa_attention_heads: int | None = None
    num_swa_key_value_heads: int | None = None
    conv_window: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = None  # a checkpoint's value is ignored: it is hidden_size / the heads of a layer
        super().__post_init__(**kwargs)
        windowed = set(self.sliding_window_layers or ())
        # vLLM and Star Attention read this attribute.
        self.layer_types = [
            "sliding_attention" if layer in windowed else "full_attention" for layer in range(self.num_hidden_layers)
        ]
        if self.conv_window != 2:
            raise ValueError(f"conv_window={self.conv_window} is refused: the shift mixes 2 tokens. Allowed: 2")
        if windowed and not self.sliding_window:
            reason = "sliding_window_layers need it. Allowed: a number of tokens"
            raise ValueError(f"sliding_window={self.sliding_window} is refused: {reason}")

    def layer_config(self, layer: int) -> BaichuanM1Config:
        """Return a copy of the configuration with the numbers of heads of one layer."""
        config = copy.copy(self)
        if self.layer_types[layer] == "sliding_attention":
            config.num_attention_heads = self.num_swa_attention_heads or self.num_attention_heads
            config.num_key_value_heads = self.num_swa_key_value_heads or self.num_key_value_heads
        config.head_dim = self.hidden_size // config.num_attention_heads
        return config
