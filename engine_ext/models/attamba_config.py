"""Configuration of an Attamba checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from starling.attention_backends.attamba.chunks import PAGE_ROWS, prompt_keys
from starling.attention_backends.attamba.mixer import MixerSizes
from starling.scheduler.star.plan import StarPlan


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
