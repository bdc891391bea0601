"""Configurations of the model families with KV shifting attention. Light: read at plugin load in every process."""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlamaConfig

SHIFT_DEPENDS = "KV shifting carries the last token of a star block into the first of the next one"


class KVShiftLlamaConfig(LlamaConfig):
    """A Llama whose K and V are shifted; the fields are Llama's."""

    model_type = "kv_shift_llama"
    star_blocks_depend = SHIFT_DEPENDS


class BaichuanM1Config(LlamaConfig):
    """Baichuan-M1: some layers see a sliding window only, with a number of heads of their own.

    ``sliding_window_layers`` lists these layers; ``conv_window`` is the tokens that are mixed, always 2.
    """

    model_type = "baichuan_m1"
    star_blocks_depend = SHIFT_DEPENDS

    sliding_window: int | None = None
    sliding_window_layers: list[int] | None = None
    num_swa_attention_heads: int | None = None
    num_swa_key_value_heads: int | None = None
    conv_window: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = None  # not the checkpoint's to say: hidden_size over a layer's own heads
        super().__post_init__(**kwargs)
        windowed = set(self.sliding_window_layers or ())
        # The name that vLLM and Star Attention read.
        self.layer_types = [
            "sliding_attention" if layer in windowed else "full_attention" for layer in range(self.num_hidden_layers)
        ]
        if self.conv_window != 2:
            raise ValueError(f"conv_window={self.conv_window} is refused: the shift mixes 2 tokens")
        if windowed and not self.sliding_window:
            raise ValueError("sliding_window_layers are given without a sliding_window")

    def of_layer(self, layer: int) -> BaichuanM1Config:
        """The configuration with the heads of one layer in place of the model's."""
        config = copy.copy(self)
        if self.layer_types[layer] == "sliding_attention":
            config.num_attention_heads = self.num_swa_attention_heads or self.num_attention_heads
            config.num_key_value_heads = self.num_swa_key_value_heads or self.num_key_value_heads
        config.head_dim = self.hidden_size // config.num_attention_heads
        return config
