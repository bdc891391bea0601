"""What a checkpoint must hold, and errors that name what it does not.

vLLM's own check sees its fused parameters: a checkpoint without one layer's k_proj, but with its q_proj, passes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

Shapes = dict[str, tuple[int, ...]]


def shift_shapes(kv_heads: int) -> Shapes:
    """Baichuan-M1's layout, in columns [previous, current]."""
    return {"self_attn.conv_k": (1, 1, kv_heads, 1, 2), "self_attn.conv_v": (1, 1, kv_heads, 1, 2)}


def mlp_and_norm_shapes(config: Any) -> Shapes:
    """Of one layer; the names within it are Llama's."""
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
    """Of what lies outside the layers."""
    table = (config.vocab_size, config.hidden_size)
    shapes: Shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (config.hidden_size,)}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": table}


def checked(
    weights: Iterable[tuple[str, torch.Tensor]], expected: Shapes, *, quantized: bool, again: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the tensors on, and see that they are those expected.

    Args:
        expected: name -> shape; other names pass unseen.
        quantized: the linear layers have tensors of other names and shapes, so only the rest is checked.
        again: the model is loaded, and these replace some of its tensors (a trainer's update): none is missing.

    Raises:
        ValueError: a tensor has another shape, or, at the end, some are missing.
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
                f"checkpoint tensor {name} has shape {tuple(tensor.shape)}, the configuration says {shape}"
            )
        yield name, tensor
    if missing and not again:
        names = [f"{name} {shape}" for name, shape in list(missing.items())[:4]]
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(f"the checkpoint lacks {', '.join(names)}{more}")
