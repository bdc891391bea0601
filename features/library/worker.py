"""Worker side of the library: the digest of the weights, by which servers share files, and calls that may change them.

The digest is computed when the weights are loaded: later they may be in the form that a kernel takes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from starling.attention_backends.star.refusals import has_library
from starling.vllm_compat.models import on_weights_loaded

SAMPLES = 256
"""Number of bytes of each tensor that are read, at equal distances."""

HARMLESS = frozenset(
    {
        "check_health",
        "compute_weight_checksums",
        "get_model_inspection",
        "init_weight_transfer_engine",
        "release_late_interaction_query_cache",
        "shutdown_weight_transfer_engine",
        "update_max_model_len",
    }
)
"""Worker methods that vLLM's front calls and that leave the weights as they are; any other may change them."""

_loaded: list[str] = []  # the digest of this process's model, once it is loaded


def note_weights(vllm_config: Any) -> None:
    """Compute the digest of the model that this process is about to load, if the server has a library."""
    if has_library(vllm_config):
        on_weights_loaded(lambda model: _loaded.append(weights_digest(model)))


def loaded_digest() -> str | None:
    """Return the digest of the weights that this process has loaded, or None if its loader does not say."""
    return _loaded[-1] if _loaded else None


def may_change_weights(method: Any) -> bool:
    """Return whether a method of all workers, or a function in its place, may change their weights."""
    return method not in HARMLESS


def name_of(method: Any) -> str:
    """Return the name of a method of workers for messages."""
    return method if isinstance(method, str) else "a function of the caller's"


def weights_digest(model: torch.nn.Module) -> str:
    """Return a SHA-256 digest of a model's parameters by name: their dtypes, shapes, and some bytes of each.

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


make = note_weights
