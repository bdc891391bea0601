"""The rotary embeddings of a loaded model, for star plans whose blocks have positions of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from starling.attention_backends.kernels.rotary import Rotation, turn_back
from starling.attention_backends.star.backend import takes_star
from starling.attention_backends.star.gpu_impl import attends_by_parts
from starling.attention_backends.star.gpu_impl import unsupported_reason as unsupported_by_triton
from starling.vllm_compat.rotary_layers import FIXED_FREQUENCIES, AttentionBlock, angle_table, attention_blocks

CHECKED_POSITIONS = (1, 5, 63)
TOLERANCES = {torch.float32: 1e-3}
OTHER_TOLERANCE = 2e-2
"""How much of a query or key may change if it is turned and turned back: rounding takes about 2e-6 in float32, and 5e-3
in bfloat16, of which a query is rounded once more than without turning."""


def turning_layers(vllm_config: Any) -> list[str]:
    """Names of a loaded model's full-attention layers that attend by the parts of a step, on a GPU."""
    layers = get_layers_from_vllm_config(vllm_config, Attention).items()
    able = ((name, layer) for name, layer in layers if attends_by_parts(layer.impl))
    return [name for name, layer in able if takes_star(layer.get_kv_cache_spec(vllm_config))]


def block_positions_problem(
    model: torch.nn.Module, layer_names: Iterable[str], device_type: str, hidden_size: int, dtype: torch.dtype
) -> str | None:
    """Why a model's layers can't attend to blocks with positions of their own; None: they can.

    Args:
        layer_names: the full-attention layers.
        device_type: of the engine.
        hidden_size: of the inputs of an attention block.
        dtype: of these inputs, the model's.
    """
    if device_type == "cpu":  # imports a backend that GPUs do not need
        from starling.attention_backends.star.cpu_impl import unsupported_reason
    else:
        unsupported_reason = unsupported_by_triton
    blocks = attention_blocks(model)
    rotations = make_rotations(model, max(CHECKED_POSITIONS) + 1)
    for name in layer_names:
        block = blocks.get(name)
        if block is None or block.rotary is None:
            return f"layer {name} has no rotary embedding beside it"
        if type(block.rotary) not in FIXED_FREQUENCIES:
            kind = type(block.rotary).__name__
            return f"layer {name} has a {kind}, whose angles may not be the same at each position"
        reason = unsupported_reason(block.attention.impl) or turning_problem(block, rotations[name], hidden_size, dtype)
        if reason is not None:
            return f"layer {name}: {reason}"
    return None


@torch.inference_mode()
def turning_problem(block: AttentionBlock, rotation: Rotation, hidden_size: int, dtype: torch.dtype) -> str | None:
    """Why the queries and keys of a block at one position are not those at another one, turned; None: they are.

    A model may leave the rotary embedding out of a layer, scale queries by their position, or change them behind the
    rotary embedding. So the same inputs go through the block at position 0 and at others, up to its attention. They
    have the model's dtype: the kernels of quantised layers take no other one, and the weights don't tell it.
    """
    device = rotation.cos.device
    positions = torch.tensor(CHECKED_POSITIONS, device=device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(positions), hidden_size, generator=generator).to(device, dtype)
    try:
        at_zero, at_positions = (block.queries_and_keys(at, hidden) for at in (torch.zeros_like(positions), positions))
    except Exception as error:
        return f"its queries can't be looked at: {error!r}"
    cos, sin = rotation.cos[positions], rotation.sin[positions]
    for what, first, second in zip(("queries", "keys"), at_zero, at_positions, strict=True):
        turned = turn_back(second, cos, sin, rotation.is_neox_style).float()
        change = ((turned - first.float()).norm() / first.float().norm()).item()
        if not change <= TOLERANCES.get(first.dtype, OTHER_TOLERANCE):
            return f"its {what} at one position are not those at another one, turned: {change:.1e} of them differs"
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

    rotaries = ((name, block.rotary) for name, block in attention_blocks(model).items())
    return {name: rotation(rotary) for name, rotary in rotaries if type(rotary) in FIXED_FREQUENCIES}
