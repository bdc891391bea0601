"""The rotary embeddings of a loaded model, for star plans whose blocks have positions of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from attention_backends.star.turned import Rotation
from attention_backends.star.turned_impl import unsupported_reason as unsupported_by_triton
from vllm_compat.rotary import FIXED_FREQUENCIES, angle_table, attention_layers, rotary_embeddings


def block_positions_problem(model: torch.nn.Module, layer_names: Iterable[str], device_type: str) -> str | None:
    """Why a model's layers can't attend to blocks with positions of their own; None: they can.

    Args:
        layer_names: the full-attention layers.
        device_type: of the engine.
    """
    if device_type == "cpu":  # imports a backend that GPUs do not need
        from attention_backends.star.cpu_impl import unsupported_reason
    else:
        unsupported_reason = unsupported_by_triton
    rotary, layers = rotary_embeddings(model), attention_layers(model)
    for name in layer_names:
        if rotary.get(name) is None:
            return f"layer {name} has no rotary embedding beside it"
        if type(rotary[name]) not in FIXED_FREQUENCIES:
            return (
                f"layer {name} has a {type(rotary[name]).__name__}, whose angles may not be the same at each position"
            )
        reason = unsupported_reason(layers[name].impl)
        if reason is not None:
            return f"layer {name} can't run on Starling's attention: {reason}"
    return None


def make_rotations(model: torch.nn.Module, num_positions: int) -> dict[str, Rotation]:
    """Layer name -> how its queries are turned. Layers that share a rotary embedding share the table of angles.

    Args:
        num_positions: the table's length, the longest prompt and its output.
    """
    made: dict[int, Rotation] = {}

    def rotation(rotary: Any) -> Rotation:
        if id(rotary) not in made:
            made[id(rotary)] = Rotation(*angle_table(rotary, num_positions), rotary.is_neox_style)
        return made[id(rotary)]

    return {name: rotation(rotary) for name, rotary in rotary_embeddings(model).items() if rotary is not None}
