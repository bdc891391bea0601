"""Models of Transformers whose attention follows star plans, with gradients: scored and trained outside an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from starling.attention_backends.star.model_heads import checkpoint_folder
from starling.scheduler.planning.plan import StarPlan

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Attend = Callable[..., torch.Tensor]
"""torch's scaled_dot_product_attention, with some arguments given."""


class ModelError(ValueError):
    """A model or a prompt that can't be scored or trained with."""


def find_model(name: str) -> Path:
    """Return the folder of a model, which is a folder or a name in the hub's cache (raises ModelError)."""
    folder = checkpoint_folder(name, None)
    if folder is None:
        raise ModelError(f"MODEL={name!r} is refused: it is no folder, and the hub's cache has no such model")
    return folder


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, name: str, attend: Callable[..., Any]) -> Any:
    """Load a causal model with frozen weights.

    Args:
        name: name of its attention, by which Transformers knows it.
        attend: that attention, as a function of Transformers' AttentionInterface.

    Raises:
        ModelError: Transformers can't load it.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever Transformers makes of a user's files
        raise ModelError(f"{folder} can't be loaded by Transformers: {error}") from None
    return model.to(device).eval().requires_grad_(requires_grad=False)


def kl_at_each(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return (places,) KL(dense, other) in nats, of (places, vocabulary) log-probabilities."""
    return (dense.exp() * (dense - other)).sum(-1)


def attention_by_plan(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: StarPlan
) -> torch.Tensor:
    """Compute attention of a prompt by its plan, block by block; what is behind blocks of one size sees everything.

    Args:
        query: (1, heads, tokens, head size); ``key`` and ``value`` have KV heads.
    """
    parts = []
    for start, end, keys in plan.split(0, query.shape[2]):
        seen = [torch.cat([each[:, :, first:stop] for first, stop in keys], 2) for each in (key, value)]
        total = seen[0].shape[2]
        mask = torch.ones(end - start, total, dtype=torch.bool, device=query.device).tril(total - (end - start))
        parts.append(attend(query[:, :, start:end], *seen, attn_mask=mask))
    return torch.cat(parts, 2)


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer that keeps its inputs alone for the backward pass.

    Memory then grows by a layer and not by a model.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
