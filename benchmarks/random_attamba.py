"""Random Attamba checkpoints for tests and benchmarks, as `random_llama` makes Llamas: fixed seed, no download.

`examples.attamba_model.load_attamba(path)` reads one as plain PyTorch, `forward(tokens (B, T) int64) -> logits
(B, T, vocab_size)`, to hold the engine against; that module says how the paper's open points are resolved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from examples.attamba_model import Attamba, AttambaConfig, write_checkpoint


def make_random_attamba(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Write a checkpoint in the served layout, with weights for which every part of the model moves the logits.

    Args:
        path: directory to make; kept as it is where it already holds this configuration and seed.
        config: AttambaConfig fields; the vocabulary defaults to the byte tokenizer's, padded to 320.
    """
    stamp = json.dumps({"seed": seed, "dtype": str(dtype)} | config, sort_keys=True)
    marker = path / "starling-made-from.json"
    if marker.exists() and marker.read_text() == stamp:
        return path
    torch.manual_seed(seed)
    model = Attamba(AttambaConfig(**{"vocab_size": 320} | config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "wq" in name or "out_proj" in name:
                # Scores spread over several units, and SSM outputs larger than x, so that a wrong mask, chunk or
                # scan moves the logits.
                weight.mul_(1.2)
            elif "norm" in name or name.endswith(".D"):
                weight.uniform_(0.5, 1.5)
    write_checkpoint(path, model.config, model.state_dict(), dtype)
    marker.write_text(stamp)
    return path
