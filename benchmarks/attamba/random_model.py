"""Random Attamba checkpoints for tests and benchmarks: fixed seed, no download.

`examples.attamba_model.load_attamba(path)` loads a checkpoint as a plain PyTorch model, `forward(tokens (B, T) int64)
-> logits (B, T, vocab_size)`, for comparison with the engine. That module also decides the paper's open points.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.attamba_model import Attamba, AttambaConfig, write_checkpoint


def make_random_attamba(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Write a checkpoint in the served layout. Its weights are such that every part of the model affects the logits.

    Args:
        path: directory to write; unchanged if it already holds this configuration and seed.
        seed: seed of the weights.
        dtype: dtype of the checkpoint.
        config: fields of AttambaConfig. The default vocabulary is the byte tokenizer's, padded to 320.

    Returns:
        ``path``.

    Raises:
        ValueError: sizes that do not fit one another.
    """
    stamp = json.dumps({"seed": seed, "dtype": str(dtype)} | config, sort_keys=True)
    marker = path / "starling-made-from.json"
    if marker.exists() and marker.read_text() == stamp:
        return path
    torch.manual_seed(seed)
    model = Attamba(AttambaConfig(**{"vocab_size": 320} | config))
    with torch.no_grad():
        # The variances of the released code, where layers add much to the residual: a wrong part shows in the logits.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(3**0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.mul_(module.embedding_dim**-0.5)
        for name, weight in model.named_parameters():
            if "wq" in name or "out_proj" in name:
                # Scores that spread over several units, and SSM outputs larger than x: a wrong mask, chunk or scan
                # changes the logits.
                weight.mul_(1.2)
            elif "norm" in name or name.endswith(".D"):
                weight.uniform_(0.5, 1.5)
    write_checkpoint(path, model.config, model.state_dict(), dtype)
    marker.write_text(stamp)
    return path
