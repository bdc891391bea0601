"""LoRA adapters of small models with random weights, and the checkpoint that has an adapter's weights added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from starling.attention_backends.star.model_heads import checkpoint_digest
from starling.config.adapter import DISTILLED, PEFT_CONFIG, WEIGHTS

ALPHA = 4


def make_adapter(
    folder: Path, model: Path, /, *, seed: int = 1, rank: int = 4, modules: Any = None, **made: Any
) -> Path:
    """An adapter of a Llama's checkpoint as `starling distil` writes it, with a large effect; returns its folder.

    Args:
        modules: the linear layers that it changes; None: all.
        made: in DISTILLED, in place of what is there by default.
    """
    folder.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    weights, names = {}, set()
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.split(".")[-2]
        if not module.endswith("_proj") or (modules is not None and module not in modules):
            continue
        names.add(module)
        base = f"base_model.model.{name.removesuffix('.weight')}"
        weights[f"{base}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=random) / weight.shape[1] ** 0.5
        weights[f"{base}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=random) / 8
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": sorted(names), "bias": "none"}
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    save_file(weights, folder / WEIGHTS)
    distilled = {"version": 1, "purposes": ["documents"], "model": "tiny", "checkpoint": checkpoint_digest(model)}
    (folder / DISTILLED).write_text(json.dumps(distilled | made))
    return folder


def merged(folder: Path, model: Path, adapter: Path) -> Path:
    """The checkpoint of a model with the weights of an adapter added, in ``folder``."""
    shutil.copytree(model, folder)
    weights, config = load_file(model / "model.safetensors"), json.loads((adapter / PEFT_CONFIG).read_text())
    added = load_file(adapter / WEIGHTS)
    for name in weights:
        base = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{base}.lora_A.weight" in added:
            change = added[f"{base}.lora_B.weight"] @ added[f"{base}.lora_A.weight"]
            weights[name] = weights[name] + (change * config["lora_alpha"] / config["r"]).to(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
