"""Configurations of the model families that Starling adds, and their registration at plugin load in every process."""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from starling.attention_backends.attamba.chunks import PAGE_ROWS, prompt_keys
from starling.attention_backends.attamba.mixer import MixerSizes
from starling.scheduler.planning.plan import StarPlan
from starling.vllm_compat.models import register_models

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


class AttambaConfig(PretrainedConfig):
    """Contents of config.json of an Attamba checkpoint. Arguments that are not listed below are Llama's.

    Args:
        token_chunk: P, the number of tokens for which the cache keeps one state.
        leading_tokens: L, the number of tokens before its own that a token sees one by one.
        ssm_heads: heads of a mixer (of K or V).
        ssm_inner: number of values of all heads of a mixer.
        ssm_state_dim: state size of each of these values.
        conv_size: taps of a mixer's convolution.

    Attributes:
        star_blocks_depend: the reason why a star block can't be computed before the previous block.

    Raises:
        ValueError: a field has a value that Attamba does not have.
    """

    model_type = "attamba"
    star_blocks_depend = (
        "a chunk that straddles a border of star blocks mixes tokens of the first block into the second"
    )

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 1536
    token_chunk: int = 8
    leading_tokens: int = 16
    ssm_heads: int = 8
    ssm_inner: int = 256
    ssm_state_dim: int = 128
    conv_size: int = 4
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = False

    def __post_init__(self, **rest: Any) -> None:
        set_by_others = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
        }
        for name, allowed in set_by_others.items():
            given = rest.pop(name, allowed)
            if given != allowed:
                reason = "num_attention_heads and hidden_size set it"
                raise ValueError(f"{name}={given} is refused: {reason}. Allowed: {allowed}")
            setattr(self, name, allowed)
        for whole, parts in (("hidden_size", "num_attention_heads"), ("ssm_inner", "ssm_heads")):
            if getattr(self, whole) % getattr(self, parts):
                raise ValueError(
                    f"{whole}={getattr(self, whole)} is refused: {parts}={getattr(self, parts)} does not divide it. "
                    f"Allowed: multiples of {parts}"
                )
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=true is refused: Attamba has its own output.weight. Allowed: false")
        super().__post_init__(**rest)

    @property
    def page_tokens(self) -> int:
        """Number of tokens of a page of chunk states. The sizes of Star Attention are multiples of it."""
        return PAGE_ROWS * self.token_chunk

    @property
    def mixer_sizes(self) -> MixerSizes:
        """Sizes of the mixers of a layer."""
        return MixerSizes(self.ssm_heads, self.ssm_inner, self.ssm_state_dim, self.conv_size)

    def prompt_keys(self, plan: StarPlan | None, num_tokens: int) -> dict[str, Any]:
        """Return the keys that a prompt attends to, see ``starling.attention_backends.attamba.chunks.prompt_keys``."""
        return prompt_keys(plan, num_tokens, self.token_chunk, self.leading_tokens, self.num_hidden_layers)


MODELS = {
    "KVShiftLlamaForCausalLM": "starling.engine_ext.models.kv_shift:KVShiftLlamaForCausalLM",
    "AttambaForCausalLM": "starling.engine_ext.models.attamba:AttambaForCausalLM",
    "BaichuanM1ForCausalLM": "starling.engine_ext.models.kv_shift:BaichuanM1ForCausalLM",
}


def register_model_families() -> None:
    """Register the model families with Transformers and vLLM in this process. A second call has no effect."""
    configs = (KVShiftLlamaConfig, BaichuanM1Config, AttambaConfig)
    register_models({config.model_type: config for config in configs}, MODELS)
