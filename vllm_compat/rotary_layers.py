"""vLLM's rotary embeddings: the angles of those of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import (
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

from starling.vllm_compat.patching import touches

FIXED_FREQUENCIES = (
    RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
"""The rotary embeddings that turn by the same angle at each step, at any position and length."""


class _Seen(Exception):
    """Ends a forward pass at its attention."""


@contextlib.contextmanager
@touches("vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA.base_layer")
def without_adapters(module: Any) -> Iterator[None]:
    """Run a module's layers without LoRA, which needs a batch, for the duration of the block.

    Goes with AttentionBlock.
    """
    layers = {name: layer for name, layer in module.named_children() if hasattr(layer, "base_layer")}
    try:
        for name, layer in layers.items():
            setattr(module, name, layer.base_layer)
        yield
    finally:
        for name, layer in layers.items():
            setattr(module, name, layer)


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """One attention layer of a loaded model, and what its model has around it.

    Attributes:
        attention: vLLM's layer, which attends over the KV cache.
        module: the model's module that has it, from hidden states to hidden states.
    """

    attention: Any
    module: Any

    @property
    def rotary(self) -> Any | None:
        """Return the rotary embedding, which vLLM's models keep beside the attention layer, or None if it has none."""
        return getattr(self.module, "rotary_emb", None)

    def queries_and_keys(self, positions: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (T, heads, head size) queries and keys with which the attention is called for T tokens.

        Args:
            positions: (T,) int64.
            hidden: (T, hidden size).

        Raises:
            RuntimeError: the attention is not called, or not with the queries and keys first.
        """
        found: list[torch.Tensor] = []

        def see(module: Any, args: Any) -> None:
            found.extend(args[:2])
            raise _Seen

        handle = self.attention.register_forward_pre_hook(see)
        try:
            with without_adapters(self.module):
                self.module(positions=positions, hidden_states=hidden)
        except _Seen:
            pass
        finally:
            handle.remove()
        if len(found) != 2:
            raise RuntimeError("the attention is not called with queries and keys")
        query, key = (part.reshape(len(positions), -1, self.attention.head_size) for part in found)
        return query, key


@touches("vllm.model_executor.layers.attention.Attention.layer_name")
def attention_blocks(model: torch.nn.Module) -> dict[str, AttentionBlock]:
    """Return layer name -> its block, for the attention layers of a loaded model.

    Goes when vLLM's layers know their rotary embedding.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, Attention)]
    found = (AttentionBlock(modules[name], modules[name.rpartition(".")[0]]) for name in names)
    return {block.attention.layer_name: block for block in found}


@touches("vllm.model_executor.layers.rotary_embedding.RotaryEmbedding._compute_cos_sin_cache")
def angle_table(rotary: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, (num_positions, rotary dimensions / 2) float32, of the angles of each position.

    ``rotary`` holds them in the model's dtype, and YaRN's are scaled. Goes when vLLM has them in float32.
    """
    cos, sin = rotary._compute_cos_sin_cache()[:num_positions].float().to(rotary.cos_sin_cache.device).chunk(2, -1)
    length = torch.hypot(cos, sin)
    return cos / length, sin / length
