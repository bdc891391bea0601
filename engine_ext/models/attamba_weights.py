"""Mapping of the tensors of an Attamba checkpoint to the parameters of the served model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

MIXERS = ("k_ssm", "v_ssm")
PAIRED = (".gate_up_proj.", ".mixers.in_proj.", ".conv_weight", ".A_log", ".D", ".norm_weight")
"""Parts of the names of parameters that consist of two shards."""


def target_shard(name: str) -> tuple[str, Any]:
    """Return the parameter that a checkpoint's tensor is loaded into, and its shard (None for the whole parameter)."""
    for index, mixer in enumerate(MIXERS):
        if f".{mixer}." in name:
            name = name.replace(f".{mixer}.", ".attentive_ssm.mixers.").replace(".ssm_norm.weight", ".norm_weight")
            if name.endswith(".out_proj.weight"):
                return name.replace(".out_proj.", f".out_proj.{index}."), None
            return name, index
    for part, shard in ((".w1.", 0), (".w3.", 1)):
        if part in name:
            return name.replace(part, ".gate_up_proj."), shard
    return name.replace(".w2.", ".down_proj."), None


def load_checkpoint(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Load all tensors of a checkpoint and return the names of the loaded parameters.

    Args:
        model: the served model.
        weights: (name, tensor) pairs of the checkpoint.

    Raises:
        ValueError: a tensor is unknown or has the wrong shape, or parameters lack tensors; the message names them.
    """
    parameters = dict(model.named_parameters())
    loaded: set[tuple[str, Any]] = set()
    for name, tensor in weights:
        target, shard = target_shard(name)
        if target not in parameters:
            raise ValueError(f"{name} is refused: an Attamba checkpoint has no tensor of that name")
        parameter = parameters[target]
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        try:
            loader(parameter, tensor, *(() if shard is None else (shard,)))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not fit config.json: {error}") from error
        loaded.add((target, shard))
    expected = {
        (name, shard) for name in parameters for shard in ((0, 1) if any(p in name for p in PAIRED) else (None,))
    }
    if missing := sorted(name for name, _ in expected - loaded):
        raise ValueError(f"the checkpoint lacks tensors of {len(missing)} parameters: {', '.join(missing[:8])}")
    return {name for name, _ in loaded}
