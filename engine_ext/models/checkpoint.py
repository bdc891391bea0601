"""The tensors that a checkpoint must hold, and the check that names a missing or misshapen tensor.

vLLM's own check covers only its fused parameters: it accepts a checkpoint that has a layer's q_proj but no k_proj.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


def shift_shapes(kv_heads: int) -> Shapes:
    """Return the shapes of one layer's shift weights in Baichuan-M1's layout, columns [previous, current]."""
    return {"self_attn.conv_k": (1, 1, kv_heads, 1, 2), "self_attn.conv_v": (1, 1, kv_heads, 1, 2)}


def mlp_and_norm_shapes(config: Any) -> Shapes:
    """Return the shapes of one layer's MLP and norms, with Llama's names within the layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.mlp_bias:
        shapes |= {
            "mlp.gate_proj.bias": (inner,),
            "mlp.up_proj.bias": (inner,),
            "mlp.down_proj.bias": (hidden,),
        }
    return shapes


def outer_shapes(config: Any) -> Shapes:
    """Return the shapes of the tensors outside the layers: embedding, final norm and, unless tied, the output head."""
    table = (config.vocab_size, config.hidden_size)
    shapes: Shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (config.hidden_size,)}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": table}


def checked_weights(
    weights: Iterable[tuple[str, torch.Tensor]], expected: Shapes, *, quantized: bool, update: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights unchanged, and check them against the expected tensors.

    Args:
        weights: (name, tensor) pairs of a checkpoint.
        expected: shapes by name. Tensors of other names are not checked.
        quantized: the linear layers have tensors of other names and shapes, so only the other tensors are checked.
        update: the weights replace some tensors of a loaded model (a trainer's update), so none counts as missing.

    Raises:
        ValueError: a tensor has another shape than expected or, at the end, tensors are missing.
    """
    if quantized:
        expected = {
            name: shape for name, shape in expected.items() if name.endswith(("conv_k", "conv_v", "norm.weight"))
        }
    missing = dict(expected)
    for name, tensor in weights:
        shape = missing.pop(name, None)
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"checkpoint tensor {name} has shape {tuple(tensor.shape)}, but config.json requires {shape}"
            )
        yield name, tensor
    if missing and not update:
        names = [f"{name} {shape}" for name, shape in list(missing.items())[:4]]
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(f"the checkpoint lacks {', '.join(names)}{more}")
