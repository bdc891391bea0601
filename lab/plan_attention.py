"""Attention by a star plan in a model of Transformers, with gradients: what is trained and scored outside an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from starling.scheduler.star.plan import StarPlan

Attend = Callable[..., torch.Tensor]
"""torch's scaled_dot_product_attention, with some arguments given."""


def attention_by_plan(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: StarPlan
) -> torch.Tensor:
    """Attention of a prompt by its plan, block by block; what is behind blocks of one size sees everything.

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
    """A layer that keeps its inputs alone for the backward pass, so that memory grows by a layer and not by a model."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
