"""A digest of a model's weights: two servers whose KV pages may be mixed have the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from starling.vllm_compat.models import on_weights_loaded

SAMPLES = 256
"""Bytes of each tensor that are read, at equal distances."""

_loaded: list[str] = []  # the digest of this process's model, once it is loaded


def note_weights() -> None:
    """Compute the digest of the model that this process is about to load, when its weights are there."""

    on_weights_loaded(lambda model: _loaded.append(weights_digest(model)))


def worker_digest(worker: Any) -> str:
    """The digest of a worker's weights: as they were loaded, or, with a loader that does not say so, as they are."""
    return _loaded[-1] if _loaded else weights_digest(worker.get_model())


def weights_digest(model: torch.nn.Module) -> str:
    """A SHA-256 digest of a model's parameters by name: their dtypes, shapes, and some bytes of each.

    Training changes nearly all weights, and their lowest bits most of all, so a few bytes of each tensor tell two sets
    of weights apart. All bytes of a model of 70B parameters would take minutes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(), key=lambda named: named[0]):
        content = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if len(content):
            offsets = torch.linspace(0, len(content) - 1, SAMPLES, dtype=torch.float64, device=content.device).long()
            digest.update(content[offsets].cpu().numpy().tobytes())
    return digest.hexdigest()
