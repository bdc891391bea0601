"""A digest of a model's weights: two servers whose KV pages may be mixed have the same.

The digest is that of the weights that were loaded at the start. Of weights in the form that ops take, little may be
left to make one of. So an engine core whose workers may have changed the weights since says so, and its server is no
peer any more.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from starling.vllm_compat.models import on_weights_loaded

SAMPLES = 256
"""Bytes of each tensor that are read, at equal distances."""

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
"""Methods of workers that a front of vLLM calls and that leave the weights as they are. Any other may change them."""

KNOWN, CHANGER = "starling_weights_known", "starling_weights_changer"  # attributes of an engine core

_loaded: list[str] = []  # the digest of this process's model, once it is loaded


def note_weights() -> None:
    """Compute the digest of the model that this process is about to load, when its weights are there."""

    on_weights_loaded(lambda model: _loaded.append(weights_digest(model)))


def loaded_digest() -> str | None:
    """The digest of the weights that this process has loaded; None: none was noted, or its loader does not say."""
    return _loaded[-1] if _loaded else None


def worker_digest(worker: Any) -> str:
    """The digest of a worker's weights: as they were loaded, or, with a loader that does not say so, as they are."""
    return loaded_digest() or weights_digest(worker.get_model())


def note_changes(core: Any, method: Any) -> None:
    """Note in an engine core that a front calls a method of its workers, which may change their weights.

    What comes before the digest is asked for belongs to the start.
    """
    if getattr(core, KNOWN, False) and may_change_weights(method):
        setattr(core, CHANGER, name_of(method))


def may_change_weights(method: Any) -> bool:
    """Whether a method of all workers, or a function in its place, may change their weights."""
    return method not in HARMLESS


def name_of(method: Any) -> str:
    """A method of workers as it is told to people."""
    return method if isinstance(method, str) else "a function of the caller's"


def changed_by(core: Any) -> str | None:
    """The method by which an engine core's weights may have changed since its digest was asked for; None: by none."""
    changer: str | None = getattr(core, CHANGER, None)
    return changer


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
