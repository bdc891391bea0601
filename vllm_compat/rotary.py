"""vLLM's rotary embeddings: one with exact angles, and the angles of those of a model."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import (
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

from vllm_compat.patching import touches


class ExactRotaryEmbedding(RotaryEmbedding):
    """Computes its angles in float64. In float32 they are off by 1e-3 at 32k tokens: too much for sharp scores.

    vLLM has no other place to give the table of angles. Goes when it has an option for the precision.
    """

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        positions = torch.arange(self.max_position_embeddings, dtype=torch.float64)
        angles = torch.outer(positions, self.base**-exponents)
        return torch.cat((angles.cos(), angles.sin()), -1).float()


FIXED_FREQUENCIES = (
    RotaryEmbedding,
    ExactRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
"""The rotary embeddings that turn by the same angle at each step, at any position and length."""


@touches("vllm.model_executor.layers.attention.Attention.layer_name")
def rotary_embeddings(model: torch.nn.Module) -> dict[str, Any]:
    """Layer name -> its rotary embedding, or None, for the attention layers of a loaded model.

    vLLM's models keep it beside the attention layer, as ``rotary_emb``. Goes when the attention layer knows it.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    parents = {name: modules[name.rpartition(".")[0]] for name, module in modules.items() if is_attention(module)}
    return {modules[name].layer_name: getattr(parent, "rotary_emb", None) for name, parent in parents.items()}


def attention_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Layer name -> vLLM's attention layer, for those of a loaded model."""
    modules: list[Any] = [module for module in model.modules() if is_attention(module)]
    return {module.layer_name: module for module in modules}


def is_attention(module: torch.nn.Module) -> bool:
    """Whether a module is vLLM's attention over a KV cache."""
    return isinstance(module, Attention)


@touches("vllm.model_executor.layers.rotary_embedding.RotaryEmbedding._compute_cos_sin_cache")
def angle_table(rotary: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (num_positions, rotary dimensions / 2) float32, of the angles of each position.

    ``rotary`` holds them in the model's dtype, and YaRN's are scaled. Goes when vLLM has them in float32.
    """
    cos, sin = rotary._compute_cos_sin_cache()[:num_positions].float().to(rotary.cos_sin_cache.device).chunk(2, -1)
    length = torch.hypot(cos, sin)
    return cos / length, sin / length
